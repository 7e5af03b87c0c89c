"""Compare runs: a table, and a plot of their loss curves.

megagamma compare_runs runs/a runs/b --output runs/comparison
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megagamma.files import write_json, write_text
from megagamma.reporting.comparison import as_table, plot
from megagamma.runs.compare import comparison, read_run


def main(arguments: list[str] | None = None) -> int:
    """Read the runs, print the table, write the table, its numbers and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, help="folder for table.md, table.json and loss.png")
    options = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in options.runs]
    rows = comparison(runs)
    text = as_table(rows)
    print(text)
    if options.output:
        write_text(options.output / "table.md", text + "\n")
        write_json(options.output / "table.json", rows)
        plot(runs, options.output / "loss.png")
        print(f"\nwrote {options.output / 'table.md'} and {options.output / 'loss.png'}")
    return 0
