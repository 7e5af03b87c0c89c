"""`megagamma coordinate_check`, from a checkout."""

import sys

from megagamma.cli import main_guard
from megagamma.commands.coordinate_check import main

if __name__ == "__main__":
    sys.exit(main_guard(main))
