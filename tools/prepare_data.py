"""`megagamma prepare_data`, from a checkout."""

import sys

from megagamma.cli import main_guard
from megagamma.commands.prepare_data import main

if __name__ == "__main__":
    sys.exit(main_guard(main))
