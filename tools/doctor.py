"""`megagamma doctor`, from a checkout."""

import sys

from megagamma.cli import main_guard
from megagamma.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main_guard(main))
