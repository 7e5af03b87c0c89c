"""How a run's weights develop: condensation, ranks, distances and updates, from its checkpoints.

    megagamma analyze_run runs/mine                         # every checkpoint that was not measured yet
    megagamma analyze_run runs/a runs/b --steps 0 100 1000 --instruments weights spectrum
    megagamma analyze_run runs/mine/hf/step_00001000        # a checkpoint or a Hugging Face folder, by role
    megagamma analyze_run theirs --instruments activations --text runs/mine     # on a run's held-out text

What was measured goes to RUN/analysis.jsonl, beside what the run measured itself (RUN/dynamics.jsonl), and is not measured
again. Every number stands beside that of a random matrix of the same shape. docs/dynamics.md has the formulas.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from megagamma.config.rules import check_instruments
from megagamma.reporting.tables import aligned_table

INSTRUMENTS = ["weights", "heads", "motion"]
_COLUMNS = ("condensation", "stable_rank", "effective_rank", "rms", "relative_distance", "update_over_weight")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else "-"


def print_line(line: dict[str, Any]) -> None:
    """Means by role of one step; in brackets those of random matrices of the same shapes."""
    random: dict[str, dict[str, list[float]]] = {}
    for values in line["matrices"].values():
        baseline = line["baselines"].get("x".join(map(str, values["shape"])), {})
        for key, value in baseline.items():
            random.setdefault(values["role"], {}).setdefault(key, []).append(value)
    cells = []
    for role, values in line["roles"].items():
        row = [role]
        for column in _COLUMNS:
            text, others = _number(values.get(column)), random.get(role, {}).get(column)
            row.append(f"{text} ({_number(sum(others) / len(others))})" if others else text)
        cells.append(tuple(row))
    widths = (18, *(22 for _ in _COLUMNS))
    print(f"\nstep {line['step']}: means over a role's matrices; in brackets a random matrix of the same shape")
    print(aligned_table(("role", *_COLUMNS), widths, cells))


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print the first and the last step."""
    parser = argparse.ArgumentParser(
        prog="megagamma analyze_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="runs; or checkpoints or Hugging Face folders"
    )
    parser.add_argument("--steps", nargs="+", type=int, help="of these checkpoints only")
    parser.add_argument(
        "--instruments",
        nargs="+",
        default=INSTRUMENTS,
        help=f"default: {' '.join(INSTRUMENTS)}; also spectrum, embeddings and activations",
    )
    parser.add_argument(
        "--text", type=Path, metavar="RUN",
        help="run whose held-out text embeddings and activations of a folder read (default: the run that it lies in)",
    )  # fmt: skip
    parser.add_argument("--json", default="", metavar="FILE", help="write all lines to a file, by path")
    given = parser.parse_args(arguments)
    # torch is imported only now, so that --help is answered at once.
    from megagamma.dynamics.analysis import analyze, analyze_folder, missing, records
    from megagamma.files import write_json
    from megagamma.runs.folder import RunFolder, is_run

    check_instruments(given.instruments)
    text = RunFolder(given.text).require_run() if given.text else None
    found: dict[str, list[dict[str, Any]]] = {}
    for path in given.paths:
        if not is_run(path):
            line = analyze_folder(path, given.instruments, text)
            print(path)
            print_line(line)
            found[str(path)] = [line]
            continue
        run = RunFolder(path).require_run()
        todo = len(missing(run, given.instruments, given.steps))
        for number, (step, line) in enumerate(analyze(run, given.instruments, given.steps), 1):
            left = (todo - number) * line["seconds"]
            print(
                f"{path}: step {step} ({number} of {todo}) took {line['seconds']:.1f}s, about {left:.0f}s left",
                flush=True,
            )
        lines = found[str(path)] = records(run)
        print(path)
        for line in {line["step"]: line for line in (lines[0], lines[-1])}.values():
            print_line(line)
    if given.json:
        write_json(given.json, found)
        print(f"written to {given.json}")
    return 0
