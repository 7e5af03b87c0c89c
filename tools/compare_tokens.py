"""`megagamma compare_tokens`, from a checkout."""

import sys

from megagamma.cli import main_guard
from megagamma.commands.compare_tokens import main

if __name__ == "__main__":
    sys.exit(main_guard(main))
