"""`megagamma find_critical_gamma`, from a checkout."""

import sys

from megagamma.cli import main_guard
from megagamma.commands.find_critical_gamma import main

if __name__ == "__main__":
    sys.exit(main_guard(main))
