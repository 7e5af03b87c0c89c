"""Try faults on your own machine and disk: each is made for real, and what is promised is checked.

    megagamma fault_drill --storage /scratch/me/drill          # all; minutes
    megagamma fault_drill --faults 'killed in a save' 'disk full'
    megagamma fault_drill --list

Small models are trained in a folder of their own below --storage, killed, and their files damaged. Nothing outside that
folder is touched, and it is deleted at the end. Exit codes: 0; 1 when a promise does not hold.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from megagamma.errors import ConfigurationError


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--storage",
        type=Path,
        default=Path("fault_drill"),
        help="folder to create, on the storage to try (default: %(default)s)",
    )
    parser.add_argument("--faults", nargs="+", metavar="NAME", help="only these (default: all; names: --list)")
    parser.add_argument("--list", action="store_true", help="print the faults and what is promised, and stop")
    parser.add_argument("--seed", type=int, default=1, help="of the places and times of faults (default %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the outcomes")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the drill; returns 1 when a promise does not hold."""
    args = build_parser().parse_args(arguments)
    if args.storage.exists():
        raise ConfigurationError(f"--storage {args.storage}: is there already: give a folder that is not")
    from megagamma.testing.faults import FAULTS

    if args.list:
        for fault in FAULTS.values():
            print(f"{fault.name:<32}{fault.promise}")
        return 0
    chosen = args.faults or list(FAULTS)
    for name in chosen:
        if name not in FAULTS:
            raise ConfigurationError(f"--faults '{name}': there is no such fault: use {', '.join(FAULTS)}")
    from megagamma.data.preparation.prepare import embedded_settings, prepare
    from megagamma.files import require_writable, write_json
    from megagamma.testing.drill import as_rows, run_fault

    # Of the server that runs are forked from, whose imports warn of extensions that are not there.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")
    storage = require_writable(args.storage, "--storage").resolve()
    outcomes = []
    try:
        prepare(embedded_settings("tiny", str(storage / "data")))
        for number, name in enumerate(chosen, 1):
            outcome = run_fault(FAULTS[name], storage, args.seed)
            outcomes.append(outcome)
            print(
                f"[{number}/{len(chosen)}] {name}: {outcome.status} ({outcome.seconds:.0f} s)\n    {outcome.seen}",
                flush=True,
            )
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if args.output:
        write_json(args.output, {"seed": args.seed, "outcomes": as_rows(outcomes)})
    broken = [outcome.fault for outcome in outcomes if outcome.status == "BROKEN"]
    skipped = [outcome.fault for outcome in outcomes if outcome.status == "skipped"]
    print(f"\n{len(outcomes) - len(broken) - len(skipped)} hold, {len(broken)} broken, {len(skipped)} skipped")
    return 1 if broken else 0
