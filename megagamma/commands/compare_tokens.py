"""Which tokens one model predicts better than another: gains by baseline loss, context, kind of token, position, frequency.

    megagamma compare_tokens runs/gamma0.5 runs/gamma1                      # newest checkpoints; runs/.../tokens.html
    megagamma compare_tokens runs/a runs/b --step 1000 --sequences 256 --output gains.html
    megagamma compare_tokens runs/gamma0.5-seed1 runs/gamma1-seed1 --judge runs/gamma0.5-seed2

The gain is the first run's loss less the second's, on the first held-out sequences of the first run's data. Both need the same
tokenizer and validation data. Kinds of tokens are told by the text and by the losses of the first run, which favours the
second where they are high; `--judge`, a run like the first of another seed, tells them without that. Losses of every token are
kept in RUN/tokens/, and not measured again.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.reporting.tables import aligned_table


def main(arguments: list[str] | None = None) -> int:
    """Measure both, print the table, write the page and its numbers."""
    parser = argparse.ArgumentParser(
        prog="megagamma compare_tokens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("baseline", type=Path, metavar="A", help="folder of a run")
    parser.add_argument("other", type=Path, metavar="B", help="folder of the run that it is compared with")
    parser.add_argument(
        "--judge", type=Path, metavar="C", help="run whose losses tell kinds of tokens apart (default: A)"
    )
    parser.add_argument("--step", type=int, help="of both (default: the newest checkpoint of each)")
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences (default: 64)")
    parser.add_argument("--output", type=Path, help="page (default: B/tokens.html); its numbers beside it as CSV")
    given = parser.parse_args(arguments)
    if given.sequences < 2:
        raise ConfigurationError(f"--sequences {given.sequences}: must be at least 2, since intervals are over them")
    # torch is imported only now, so that --help is answered at once.
    from megagamma.dynamics.token_gains import check_comparable, gains
    from megagamma.dynamics.token_losses import TokenLosses, kept_file, of_checkpoint, pieces_of
    from megagamma.files import write_text
    from megagamma.report.passages import page
    from megagamma.reporting.tables import csv_table
    from megagamma.runs.folder import RunFolder

    found: list[TokenLosses] = []
    for path in (given.baseline, given.other, *([given.judge] if given.judge else [])):
        run = RunFolder(path).require_run()
        steps = run.steps()
        if not steps or (given.step is not None and given.step not in steps):
            wanted = "" if given.step is None else f" of step {given.step}"
            raise MegagammaError(f"{path}: has no checkpoint{wanted}: it has {', '.join(map(str, steps)) or 'none'}")
        step = steps[-1] if given.step is None else given.step
        print(f"{path}: losses of step {step}", flush=True)
        found.append(of_checkpoint(run.checkpoint(step), given.sequences, kept_file(run, step)))
        check_comparable(found[0], found[-1])
    first, second, *judges = found
    pieces = pieces_of(RunFolder(given.baseline))
    rows = gains(first, second, pieces, judge=judges[0] if judges else None)
    widths = (32, 24, 10, 10, 12, 24)
    cells = [
        (
            one.split,
            one.kind,
            f"{one.tokens:,}",
            f"{one.baseline:.4f}",
            f"{one.gain:+.4f}",
            f"{one.low:+.4f} to {one.high:+.4f}",
        )
        for one in rows
    ]
    print(
        aligned_table(
            ("split", "tokens that are", "number", "loss of A", "gain [nats]", "95 % interval"), widths, cells
        )
    )
    print("intervals are over sequences of this text, for these two models: another seed of training is not in them")
    output = given.output or given.other / "tokens.html"
    names = (given.baseline.resolve().name, given.other.resolve().name)
    write_text(output, page(first, second, names, pieces, rows))
    write_text(output.with_suffix(".csv"), csv_table(list(asdict(rows[0])), map(asdict, rows)))
    print(f"wrote {output} and {output.with_suffix('.csv')}")
    return 0
