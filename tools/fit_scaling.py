"""`megagamma fit_scaling`, from a checkout."""

import sys

from megagamma.cli import main_guard
from megagamma.commands.fit_scaling import main

if __name__ == "__main__":
    sys.exit(main_guard(main))
