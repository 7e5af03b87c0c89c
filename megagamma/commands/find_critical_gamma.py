"""The critical gamma of a config: a search over gamma and learning rate, coarse to fine, and every reading of it.

    megagamma find_critical_gamma --config configs/demo.yaml --steps 600 --seeds 1 2 3
    megagamma find_critical_gamma --config configs/demo.yaml configs/short.yaml --steps 300
    megagamma find_critical_gamma --gammas 0.4 0.5 0.65 0.8 1 1.25 --rates 0.002 0.004 0.008 --widths 64 128 256

Every gamma is trained at every rate on the first seed, where points that are far behind at half of their run are ended. One
whose best rate is the smallest or largest tried gets half or twice that rate too, --widen times. The other seeds take its best
rate. Then the gaps beside the best gamma are halved, --rounds times. Readings, each at the gamma's best rate, with intervals
over seeds: the lowest loss; the lowest loss of those that are not too slow; the lowest loss on tokens that context decides;
where hidden matrices move as far as they were long, and where that stops to depend on the width (three widths); where runs
begin to spike. Writes OUTPUT/critical.json, trials.csv and critical.png; given again, it resumes. Exit code 1: the best gamma
is at an edge of those tried. --gammas, --rates, --seeds, --rounds and --widen may change between starts.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagamma.cli import EXIT_STOPPED
from megagamma.errors import ConfigurationError
from megagamma.reporting.tables import aligned_table

if TYPE_CHECKING:
    from megagamma.scaling.critical import Critical, Reading, Trial
    from megagamma.scaling.folder import PointState

GAMMAS = [0.4, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25]
RATES = [0.002, 0.004, 0.008]


class Stopped(Exception):
    """A signal has ended a sweep, whose points are saved."""


Rates = dict[tuple[int, float], list[float]]
"""Learning rates by width and gamma; the width is 0 where --widths is not given."""


def _study(given: argparse.Namespace, rates: Rates, seeds: list[int], is_tuned: bool) -> dict[str, Any]:
    """A sweep over gammas, each at its own learning rates."""
    every = sorted({rate for of in rates.values() for rate in of})
    gammas = sorted({gamma for _, gamma in rates})
    axes: dict[str, Any] = {"init.gamma": gammas, "optimizer.lr": {"values": every, "tuned": is_tuned}}
    if given.widths:
        axes["width"] = {
            f"d{width}": {
                "model.hidden_size": width, "model.ffn_hidden_size": 3 * width, "model.head_dim": 32,
                "model.num_attention_heads": width // 32, "model.num_query_groups": width // 32,
            }
            for width in given.widths
        }  # fmt: skip
    exclude = [
        {"init.gamma": gamma, "optimizer.lr": rate, **({"width": f"d{width}"} if width else {})}
        for width in given.widths or [0]
        for gamma in gammas
        for rate in every
        if rate not in rates.get((width, gamma), [])
    ]
    return {
        "name": "critical",
        "config": [str(path.resolve()) for path in given.config],
        "set": {
            "run.steps": given.steps, "validation.interval": max(1, given.steps // 12), "dynamics.log_spaced": True,
            "dynamics.instruments": ["weights"], "logging.sample_tokens": 0, "logging.wandb": "disabled",
        },
        "axes": axes,
        "exclude": exclude,
        "seeds": seeds,
        "arms": ["init.gamma"],
        "stop_lost": {"after": 0.5, "margin": given.margin},
    }  # fmt: skip


def _sweep(given: argparse.Namespace, name: str, study: dict[str, Any]) -> list[PointState]:
    """Train the points of a sweep; returns their states."""
    from megagamma.commands.sweep import main as sweep
    from megagamma.config.yaml_reader import read_yaml, write_yaml
    from megagamma.files import write_text
    from megagamma.scaling.folder import SweepFolder
    from megagamma.scaling.points import expand
    from megagamma.scaling.spec import read_sweep

    def kept(values: Any) -> Any:
        return {key: one for key, one in values.items() if key not in ("axes", "exclude", "seeds")}

    file, state = given.output / f"{name}.yaml", given.output / name
    if file.is_file() and kept(read_yaml(file)) != kept(study):
        raise ConfigurationError(f"--output {given.output}: holds another search: give another folder, or delete it")
    given.output.mkdir(parents=True, exist_ok=True)
    write_text(file, write_yaml(study))
    if given.plan:
        sweep(["plan", str(file), "--state", str(state)])
        return []
    if sweep(["run", str(file), "--state", str(state)]) == EXIT_STOPPED:
        raise Stopped
    planned, folder = read_sweep(file), SweepFolder(state)
    return folder.states(expand(planned, folder.points), planned.retries)


def _round(given: argparse.Namespace, number: int, gammas: list[float]) -> list[tuple[Trial, Path]]:
    """Train one round of gammas; returns its trials and their folders."""
    from megagamma.scaling.critical import best_rates, beyond, trial_of

    def trials(states: list[PointState]) -> list[tuple[Trial, Path]]:
        return [(trial, state.folder) for state in states if (trial := trial_of(state)) is not None]

    if not given.plan:
        print(f"\n== round {number}: gamma {', '.join(f'{gamma:g}' for gamma in gammas)}", flush=True)

    def at(width: int) -> int:
        return width if given.widths else 0

    tried: Rates = {(width, gamma): sorted(given.rates) for width in given.widths or [0] for gamma in gammas}
    for turn in range(given.widen + 1):
        found = trials(_sweep(given, f"round{number}", _study(given, tried, given.seeds[:1], True)))
        more = beyond([trial for trial, _ in found])
        if given.plan or not more or turn == given.widen:
            break
        print(
            f"\n== round {number}, wider: gamma " + ", ".join(f"{key[1]:g} at {more[key]:g}" for key in more),
            flush=True,
        )
        for (width, gamma), rate in more.items():
            tried[at(width), gamma].append(rate)
    rates, _ = best_rates([trial for trial, _ in found])
    if given.plan or len(given.seeds) == 1 or not rates:
        return found
    print(f"\n== round {number}: the best learning rates, seeds {', '.join(map(str, given.seeds[1:]))}", flush=True)
    best: Rates = {(at(width), gamma): [rate] for (width, gamma), rate in rates.items()}
    return found + trials(_sweep(given, f"round{number}_seeds", _study(given, best, given.seeds[1:], False)))


def _with_context(trials: list[tuple[Trial, Path]], width: int, baseline: float, sequences: int) -> list[Trial]:
    """Trials with their loss on tokens whose context gain is above 1 nat under the baseline, at best rates.

    The baseline of another seed than a trial's: of its own, those tokens would be ones that it did well on by chance.
    """
    from megagamma.dynamics.token_gains import another_seed
    from megagamma.dynamics.token_losses import TokenLosses, keep_newest, newest_kept
    from megagamma.runs.folder import RunFolder
    from megagamma.scaling.critical import best_rates

    rates, _ = best_rates([trial for trial, _ in trials])

    def losses(folder: Path) -> TokenLosses | None:
        run = RunFolder(folder)
        return newest_kept(run) if keep_newest(run, sequences) else None

    bases: dict[int, TokenLosses] = {}
    for trial, folder in trials:
        is_base = (trial.width, trial.gamma, trial.rate) == (width, baseline, rates.get((width, baseline)))
        if is_base and trial.loss is not None and (base := losses(folder)) is not None:
            bases[trial.seed] = base
    found = []
    for trial, folder in trials:
        is_chosen = trial.width == width and rates.get((width, trial.gamma)) == trial.rate and trial.loss is not None
        own = losses(folder) if is_chosen and trial.seed in bases else None
        if own is not None:
            judge = another_seed(trial.seed, bases) or bases[trial.seed]
            if (mask := judge.short - judge.full > 1.0).any():
                trial = replace(trial, context_loss=float(own.full[mask].mean()))
        found.append(trial)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Search, read, print, write."""
    parser = argparse.ArgumentParser(
        prog="megagamma find_critical_gamma", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", nargs="+", type=Path, default=[Path("configs/demo.yaml")], metavar="FILE",
        help="what every run starts from; later files win (default: configs/demo.yaml)",
    )  # fmt: skip
    parser.add_argument("--gammas", nargs="+", type=float, default=GAMMAS, help="of the first round, for all roles")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates of every gamma")
    parser.add_argument("--widths", nargs="+", type=int, default=[], help="hidden sizes (default: the config's)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--steps", type=int, default=600, help="of every run (default: 600)")
    parser.add_argument("--rounds", type=int, default=2, help="1: no refinement (default: 2)")
    parser.add_argument(
        "--widen", type=int, default=2, help="learning rates beyond --rates that a gamma may get (default: 2)"
    )
    parser.add_argument("--baseline", type=float, default=0.5, help="gamma that times are compared with (default: 0.5)")
    parser.add_argument(
        "--slower", type=float, default=1.25, help="times the baseline's tokens that are allowed (default: 1.25)"
    )
    parser.add_argument(
        "--margin", type=float, default=0.3, help="nats behind the best at which a point is ended (default: 0.3)"
    )
    parser.add_argument("--sequences", type=int, default=32, help="held-out sequences measured token by token; 0: none")
    parser.add_argument("--output", type=Path, default=Path("runs/critical"), help="default: %(default)s")
    parser.add_argument("--plan", action="store_true", help="print what the first round costs; start nothing")
    given = parser.parse_args(arguments)
    given.gammas = sorted(set(given.gammas))
    if len(given.gammas) < 3 or given.baseline not in given.gammas:
        raise ConfigurationError(
            f"--gammas {' '.join(map(str, given.gammas))}: give at least three, the baseline {given.baseline:g} among them"
        )
    for width in given.widths:
        if width < 32 or width % 32:
            raise ConfigurationError(f"--widths {width}: must be a multiple of 32, the width of a head")
    if given.steps < 12 or given.rounds < 1 or given.widen < 0:
        raise ConfigurationError(
            f"--steps {given.steps}, --rounds {given.rounds}, --widen {given.widen}: at least 12 steps, 1 round, 0 rates"
        )
    from megagamma.scaling.critical import best_rates, critical, drift, finer, readings

    trials: list[tuple[Trial, Path]] = []
    gammas, found, width = given.gammas, [], 0
    for number in range(1, given.rounds + 1):
        try:
            trials += _round(given, number, gammas)
        except Stopped:
            return EXIT_STOPPED
        if given.plan:
            return 0
        width = max(trial.width for trial, _ in trials)
        found = readings([trial for trial, _ in trials], width, given.baseline)
        known = {one.gamma for one in found}
        gammas = [gamma for gamma in finer(found) if gamma not in known]
        if not gammas:
            break
    complete = [trial for trial, _ in trials]
    if given.sequences:
        complete = _with_context(trials, width, given.baseline, given.sequences)
        found = readings(complete, width, given.baseline)
    rows = critical(found, given.slower)
    exponents, where = drift(complete)
    rows.append(where)
    warnings = best_rates(complete)[1]
    _print(found, rows, exponents, warnings, width)
    _write(given.output, complete, found, rows, exponents, warnings)
    return int(rows[0].gamma is None)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _mean(values: dict[int, float] | Any) -> float:
    return math.fsum(values.values()) / len(values) if values else math.nan


def _print(
    found: list[Reading], rows: list[Critical], exponents: dict[float, float], warnings: list[str], width: int
) -> None:
    cells = [
        (
            f"{one.gamma:g}", f"{one.rate:g}", str(len(one.losses)), *(_number(_mean(values)) for values in (
                one.losses, one.times, one.contexts, one.distances)), f"{one.spikes}/{one.runs}",
            _number(exponents.get(one.gamma)),
        )
        for one in found
    ]  # fmt: skip
    titles = ("gamma", "best lr", "seeds", "loss", "tokens", "context loss", "distance", "spiked", "over width")
    print(f"\nwidth {width}; tokens to the baseline's loss at half of its run, over its own:")
    print(aligned_table(titles, (7, 9, 7, 9, 9, 13, 10, 8, 11), cells))
    for row in rows:
        spread = f", 95 % interval over seeds {row.low:.3f} to {row.high:.3f}" if math.isfinite(row.low) else ""
        print(f"{row.reading}: {'not found' if row.gamma is None else f'gamma {row.gamma:.3f}{spread}'} ({row.note})")
    for warning in warnings:
        print(f"WARNING {warning}")


def _write(
    output: Path,
    trials: list[Trial],
    found: list[Reading],
    rows: list[Critical],
    exponents: dict[float, float],
    warnings: list[str],
) -> None:
    from megagamma.evaluation.scores import plain
    from megagamma.files import write_json, write_text
    from megagamma.reporting.plots import finish_axis, new_figure, save_figure
    from megagamma.reporting.tables import csv_table
    from megagamma.scaling.critical import Trial
    from megagamma.scaling.paired import interval

    values = {
        "readings": [asdict(row) for row in rows], "gammas": [asdict(one) for one in found], "over_width": exponents,
        "warnings": warnings,
    }  # fmt: skip
    write_json(output / "critical.json", plain(values))
    columns = [field.name for field in fields(Trial) if field.name != "curve"]
    write_text(output / "trials.csv", csv_table(columns, [asdict(trial) for trial in trials]))
    panels = (
        ("losses", "final loss [nats/token]", "loss"), ("times", "tokens to a loss, over the baseline's", "balance"),
        ("contexts", "loss where context decides [nats]", "context"), ("distances", "|W - W0| / |W0|", "boundary"),
    )  # fmt: skip
    marks = {row.reading: row.gamma for row in rows}
    figure, axes = new_figure(1, len(panels), 3.8, 3.4)
    for axis, (number, title, reading) in zip(axes[0], panels, strict=True):
        bars = [
            (one.gamma, *interval(list(of.values())))
            for one in found
            if (of := getattr(one, number)) and all(map(math.isfinite, of.values()))
        ]
        if bars:
            errors = [[mean - low if math.isfinite(low) else 0.0 for _, mean, low, _ in bars]]
            axis.errorbar(
                [bar[0] for bar in bars], [bar[1] for bar in bars], yerr=errors * 2, marker="o", label="mean over seeds"
            )
        if marks.get(reading) is not None:
            axis.axvline(marks[reading], color="C1", linestyle="--", label=reading)
        finish_axis(axis, "gamma", title, 7)
    save_figure(figure, output / "critical.png")
    print(f"wrote {output}/critical.json, trials.csv and critical.png")
