"""`megagamma analyze_run`, from a checkout."""

import sys

from megagamma.cli import main_guard
from megagamma.commands.analyze_run import main

if __name__ == "__main__":
    sys.exit(main_guard(main))
