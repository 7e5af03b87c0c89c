"""How activations, logits and updates depend on the width, under any scheme of initialization: exponents, spreads, a plot.

    megagamma coordinate_check                                              # gamma 1, gamma 0.5, mup and fixed
    megagamma coordinate_check --schemes gamma=1 gamma=1,embedding=0.5,head=0.5 mup --widths 64 128 256 512
    megagamma coordinate_check --config my.yaml --lr 0.001 --seeds 1 2 3

Each scheme trains a few steps at each width, at one learning rate, heads added with the width, and every step is measured.
Under a rule that transfers over widths, exponents are about 0 and spreads about 1 at all steps; gamma says that they are not,
by design: at gamma 1 the residual stream begins at d^-1. Writes OUTPUT/coordinates.csv, dependences.csv and coordinates.png;
given again, it resumes.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.reporting.tables import aligned_table

SCHEMES = ["gamma=1", "gamma=0.5", "mup", "fixed"]


def main(arguments: list[str] | None = None) -> int:
    """Train, read, print, write."""
    parser = argparse.ArgumentParser(
        prog="megagamma coordinate_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="configs/smoke.yaml", help="what every run starts from (default: %(default)s)"
    )
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, help=f"default: {' '.join(SCHEMES)}")
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128, 256], help="default: 32 64 128 256")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--steps", type=int, default=10, help="default: 10")
    parser.add_argument("--lr", type=float, default=0.003, help="learning rate (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/coordinates"), help="default: %(default)s")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        raise ConfigurationError(f"--steps {given.steps}: must be at least 1")
    from megagamma.commands.sweep import main as sweep
    from megagamma.config.yaml_reader import write_yaml
    from megagamma.files import write_text
    from megagamma.reporting.tables import csv_table
    from megagamma.runs.folder import RunFolder
    from megagamma.scaling.coordinates import NUMBERS, Coordinate, Dependence, coordinates, dependences, study
    from megagamma.scaling.folder import SweepFolder
    from megagamma.scaling.points import expand
    from megagamma.scaling.spec import read_sweep

    file = given.output / "coordinates.yaml"
    text = write_yaml(
        study(str(Path(given.config).resolve()), given.schemes, given.widths, given.seeds, given.steps, given.lr)
    )
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ConfigurationError(f"--output {given.output}: holds another check: give another folder, or delete it")
    given.output.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    code = sweep(["run", str(file), "--state", str(given.output / "sweep")])
    if code:
        return code
    folder, planned = SweepFolder(given.output / "sweep"), read_sweep(file)
    found = []
    for state in folder.states(expand(planned, folder.points), planned.retries):
        if state.status == "done":
            found += coordinates(RunFolder(state.folder), state.point.labels["scheme"])
    rows = dependences(found)
    if not rows:
        raise MegagammaError(f"{given.output}: no point was measured: see megagamma sweep status {file}")
    last = max(row.step for row in rows)
    shown = [row for row in rows if row.step in (0, 1, last)]
    cells = []
    for scheme in dict.fromkeys(row.scheme for row in shown):
        for number, title in NUMBERS.items():
            of = {row.step: row for row in shown if (row.scheme, row.number) == (scheme, number)}
            if of:
                texts = (
                    f"{of[step].exponent:+.2f} ({of[step].spread:.2f})" if step in of else "-" for step in (0, 1, last)
                )
                cells.append((scheme, title, *texts))
    print("\nexponent of each number over the width, in brackets its spread, largest over smallest:")
    print(aligned_table(("scheme", "number", "step 0", "step 1", f"step {last}"), (22, 44, 15, 15, 15), cells))
    for name, kind, values in (("coordinates", Coordinate, found), ("dependences", Dependence, rows)):
        columns = [field.name for field in fields(kind)]
        write_text(given.output / f"{name}.csv", csv_table(columns, [asdict(value) for value in values]))
    _plot(found, given.output / "coordinates.png")
    print(f"wrote {given.output}/coordinates.csv, dependences.csv and coordinates.png")
    return 0


def _plot(found: list, path: Path) -> None:  # type: ignore[type-arg]
    """Every number over the width, a column a scheme, a line a step."""
    import statistics

    from megagamma.reporting.plots import finish_axis, new_figure, save_figure
    from megagamma.scaling.coordinates import NUMBERS

    schemes = list(dict.fromkeys(one.scheme for one in found))
    figure, axes = new_figure(len(NUMBERS), len(schemes), 3.4, 2.4)
    for row, (number, title) in enumerate(NUMBERS.items()):
        for column, scheme in enumerate(schemes):
            axis, values = axes[row][column], [one for one in found if (one.scheme, one.number) == (scheme, number)]
            steps = sorted({one.step for one in values})
            for step in (one for index, one in enumerate(steps) if index in (0, 1, len(steps) // 2, len(steps) - 1)):
                widths = sorted({one.width for one in values if one.step == step})
                means = [
                    statistics.fmean(one.value for one in values if (one.step, one.width) == (step, width))
                    for width in widths
                ]
                axis.plot(widths, means, marker="o", markersize=3, label=f"step {step}")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(scheme if row == 0 else "", fontsize=9)
            finish_axis(axis, "width" if row + 1 == len(NUMBERS) else "", title if column == 0 else "", 6)
            axis.yaxis.label.set_fontsize(7)
    save_figure(figure, path)
