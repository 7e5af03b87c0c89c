"""`megagamma fault_drill`, from a checkout."""

import sys

from megagamma.cli import main_guard
from megagamma.commands.fault_drill import main

if __name__ == "__main__":
    sys.exit(main_guard(main))
