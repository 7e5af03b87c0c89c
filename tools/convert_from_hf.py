"""`megagamma convert_from_hf`, from a checkout."""

import sys

from megagamma.cli import main_guard
from megagamma.commands.convert_from_hf import main

if __name__ == "__main__":
    sys.exit(main_guard(main))
