"""Look at checkpoints without a model: what is in one, whether it is valid, where two differ.

    megagamma checkpoint inspect runs/mine                   # the newest; --step 500 for another
    megagamma checkpoint verify runs/mine                    # all of the run, and the newest valid one
    megagamma checkpoint diff runs/a runs/b --tolerance 1e-5
    megagamma checkpoint lineage runs/mine                   # is step 0 the seed's draw, and is each step its own?
    megagamma checkpoint seal runs/mine                      # add the checksum that checkpoint.json of version 0.1 lacks

A PATH is a checkpoint's folder, a link to one, or a run's; links inside a run are none of its checkpoints. Exit codes:
0; 1 when `diff` finds tensors that differ by more than the tolerance, or `lineage` a step that is not what it says; 2 when a
checkpoint is corrupt (the file is named) or not there. Options that differ are shown by `diff`, but do not count: two runs
have different folders at least.

Checksums guard against accidents and not against intent: whoever can write a checkpoint can write its checksums.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from megagamma.errors import CheckpointError, ConfigurationError
from megagamma.files import write_json
from megagamma.reporting.tables import aligned_table
from megagamma.runs.folder import RunFolder, checkpoint_folders

# What reads checkpoints imports torch, and is imported when it is needed: a wrong path is answered at once.

LIMITS = (
    "Checksums guard against accidents and not against intent: whoever can write a checkpoint can write its checksums."
)


def inspect(known: argparse.Namespace) -> dict[str, Any]:
    """Print what is in a checkpoint."""
    folder = checkpoint_folders(known.path, known.step)[-1]
    from megagamma.checkpoint.inspection import describe

    found = describe(folder)
    print(
        f"{found['folder']}: step {found['step']:,}, {found['samples']:,} samples, {found['tokens']:,} tokens, "
        f"format {found['format_version']}"
    )
    width = max((len(row["name"]) for row in found["tensors"]), default=0) + 2
    cells = [
        (
            row["name"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            f"{row['std']:.4e}",
            f"{row['rms']:>13.4e}" + (f"  {row['not_finite']:,} not finite" if row["not_finite"] else ""),
        )
        for row in found["tensors"]
    ]
    print("\n" + aligned_table(("weight", "shape", "dtype", "std", "rms"), (width, 16, 10, 13, 13), cells))
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["kinds"].items())
    print(f"\n{found['weights']:,} weights; tensors: {kinds}\n")
    for entry in found["files"]:
        print(f"{entry['file']:<36}{entry['bytes']:>18,} bytes")
    print(f"{'total':<36}{found['total_bytes']:>18,} bytes")
    return found


def verify(known: argparse.Namespace) -> dict[str, Any]:
    """Print the state of every file. The error about corruption is left to `main`, which writes the JSON first."""
    folders = checkpoint_folders(known.path, known.step)
    from megagamma.checkpoint.inspection import verify_files

    checked: list[dict[str, Any]] = []
    for folder in folders:
        rows = verify_files(folder, full=not known.quick)
        checked.append({"folder": str(folder), "sound": not any(row["problem"] for row in rows), "files": rows})
        print(folder)
        for row in rows:
            note = f" ({row['note']})" if row["note"] else ""
            print(f"  {row['file']:<36}{row['problem'] or 'ok'}{note}")
    newest = next((one["folder"] for one in reversed(checked) if one["sound"]), None)
    print(f"newest valid checkpoint: {newest or 'none'}" + (" (sizes only)" if known.quick else ""))
    problems = [row["problem"] for one in checked for row in one["files"] if row["problem"]]
    return {"checkpoints": checked, "newest_sound": newest, "quick": known.quick, "problems": problems}


def seal(known: argparse.Namespace) -> dict[str, Any]:
    """Add the checksum of checkpoint.json where it is missing, after checking all else."""
    added, problems = [], []
    from megagamma.checkpoint import inspection

    for folder in checkpoint_folders(known.path, known.step):
        try:
            if inspection.seal(folder):
                added.append(str(folder))
            print(f"{folder}: {'sealed' if added[-1:] == [str(folder)] else 'is sealed already'}")
        except CheckpointError as error:
            problems.append(str(error))
            print(f"{folder}: NOT sealed: {error}")
    return {"sealed": added, "problems": problems}


def diff(known: argparse.Namespace) -> dict[str, Any]:
    """Print where two checkpoints differ."""
    if not 0 <= known.tolerance < math.inf:
        raise ConfigurationError(f"--tolerance {known.tolerance} must be a finite number, 0 or more")
    first, second = (checkpoint_folders(path, known.step)[-1] for path in (known.a, known.b))
    from megagamma.checkpoint.inspection import difference

    found = difference(first, second, tolerance=known.tolerance)
    for folder, step, samples in zip(found["folders"], found["steps"], found["samples"], strict=True):
        print(f"{folder}: step {step:,}, {samples:,} samples")
    for option in found["knobs"]:
        print(f"option  {option}")
    rows = found["different"]
    if rows:
        width = max(len(row["name"]) for row in rows) + 2
        print(f"\n{'kind':<12}{'tensor':<{width}}{'absolute':>12}{'relative':>12}")
        for row in rows:
            numbers = row["note"] or f"{row['absolute']:>12.3e}{row['relative']:>12.3e}"
            print(f"{row['kind']:<12}{row['name']:<{width}}{numbers}")
    print(
        f"\n{len(rows)} of {found['compared']} tensors differ by more than {known.tolerance:g}, relative to their largest "
        f"number; largest relative difference {found['largest_relative']:.3e}"
    )
    return found


def lineage(known: argparse.Namespace) -> dict[str, Any]:
    """Print whether a run's checkpoints are the seed's draw and what became of it, step by step."""
    run = RunFolder(known.path).require_run()
    from megagamma.dynamics.lineage import lineage as examine

    found = examine(run)
    for text, lines in (("holds", found.shown), ("not shown", found.not_shown), ("WRONG", found.problems)):
        for line in lines:
            print(f"{text:<10}{line}")
    return {"shown": found.shown, "not_shown": found.not_shown, "problems": found.problems}


def _json(value: Any) -> Any:
    """JSON has no numbers that are not finite: null."""
    if isinstance(value, dict):
        return {key: _json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: list[str] | None = None) -> int:
    """Parse, do, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action in (
        ("inspect", inspect),
        ("verify", verify),
        ("diff", diff),
        ("lineage", lineage),
        ("seal", seal),
    ):
        summary = (action.__doc__ or "").split(".")[0]
        about = summary + (f". {LIMITS}" if name == "verify" else ".")
        one = commands.add_parser(name, help=summary.lower(), description=about)
        one.set_defaults(action=action)
        for argument in ("a", "b") if name == "diff" else ("path",):
            one.add_argument(argument, type=Path, help="folder of a checkpoint, or of a run")
        if name != "lineage":
            one.add_argument(
                "--step", type=int, help="which checkpoint of a run (default: the newest; verify, seal: all)"
            )
        one.add_argument("--json", type=Path, metavar="FILE", help="write the result to a file")
        if name == "verify":
            one.add_argument("--quick", action="store_true", help="compare sizes and headers only, not checksums")
        if name == "diff":
            one.add_argument(
                "--tolerance", type=float, default=0.0,
                help="largest difference of a tensor that passes, over the tensor's largest number (default: 0)",
            )  # fmt: skip
    known = parser.parse_args(arguments)
    found = known.action(known)
    if known.json:
        write_json(known.json, _json(found))
    if known.command == "diff":
        return 0 if found["equal"] else 1
    if known.command == "lineage":
        return 1 if found["problems"] else 0
    if known.command in ("verify", "seal"):
        problems = found["problems"]
        if problems:
            more = f" ({len(problems) - 1} more above)" if len(problems) > 1 else ""
            raise CheckpointError(problems[0] + more)
    return 0
