"""Table and loss curves of several runs.

python tools/compare_runs.py runs/a runs/b --output runs/comparison
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megagamma.cli import main_guard
from megagamma.files import write_json, write_text
from megagamma.runs.compare import as_table, comparison, plot, read_run


def main() -> int:
    """Read the runs, print the table, write the table, its numbers and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, help="folder for table.md, table.json and loss.png")
    known = parser.parse_args()
    runs = [read_run(folder) for folder in known.runs]
    rows = comparison(runs)
    text = as_table(rows)
    print(text)
    if known.output:
        write_text(known.output / "table.md", text + "\n")
        write_json(known.output / "table.json", rows)
        plot(runs, known.output / "loss.png")
        print(f"\nwrote {known.output / 'table.md'} and {known.output / 'loss.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
