"""A page about runs: losses, how weights condense and expand, how they move; one HTML file that needs no network.

    megagamma report runs/mine                                  # runs/mine/report.html
    megagamma report runs/a runs/b --output runs/both.html      # overlaid; the legend says what differs
    megagamma sweep report SWEEP.yaml                           # every point of a sweep

Weights are shown as far as they were measured: by the run (--dynamics.log_spaced true) or by tools/analyze_run.py;
--analyze measures what is missing from the checkpoints first, and --tokens the loss of every token of held-out sequences,
which gains by kinds of tokens need. Scores are those that tools/convert_and_eval.py has left in RUN/eval.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megagamma.errors import MegagammaError

if TYPE_CHECKING:
    from megagamma.report.figures import Figure


def write_report(
    paths: list[Path], output: Path, title: str, analyze: bool = False, tokens: int = 0, recorded: Sequence[Figure] = ()
) -> None:
    """Read the runs, and write the page; of several, those that cannot be read are named and left out.

    Args:
        analyze: measure checkpoints first that were not measured yet.
        tokens: held-out sequences on which every run's newest checkpoint is measured first, token by token.
        recorded: figures of other runs, shown as such.

    Raises:
        MegagammaError: none can be read, or the page cannot be written.
    """
    from megagamma.report.page import write
    from megagamma.report.runs import read

    runs, problems = [], []
    for path in paths:
        try:
            if analyze:
                from megagamma.commands.analyze_run import main as analyze_run

                analyze_run([str(path)])
            runs.append(read(path))
            if tokens:
                from megagamma.dynamics.token_losses import keep_newest

                if not keep_newest(runs[-1].folder, tokens):
                    runs[-1].notes.append("its losses by token were not measured: it has no checkpoint")
        except MegagammaError as error:
            if len(paths) == 1:
                raise
            problems.append(str(error))
            print(f"left out: {error}")
    if not runs:
        raise MegagammaError(f"no run can be shown: {problems[0]}")
    write(runs, output, title, recorded)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


def add_tokens_option(parser: argparse.ArgumentParser) -> None:
    """`--tokens`, of `megagamma report` and `megagamma sweep report`."""
    parser.add_argument(
        "--tokens", type=int, default=0, metavar="SEQUENCES",
        help="measure the loss of every token of so many held-out sequences under each newest checkpoint (default: those kept)",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Parse, read, write."""
    parser = argparse.ArgumentParser(
        prog="megagamma report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--output", type=Path, help="file (default: RUN/report.html, of several runs/report.html)")
    parser.add_argument("--title", help="default: the runs' names")
    parser.add_argument("--analyze", action="store_true", help="measure checkpoints that were not measured yet")
    add_tokens_option(parser)
    given = parser.parse_args(arguments)
    default = given.runs[0] / "report.html" if len(given.runs) == 1 else Path("runs/report.html")
    title = given.title or ", ".join(path.resolve().name for path in given.runs[:4])
    write_report(given.runs, given.output or default, title, given.analyze, given.tokens)
    return 0
