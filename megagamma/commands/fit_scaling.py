"""Scaling laws of the arms of a sweep: exponents, their difference, the effective speed-up, all with intervals.

    megagamma fit_scaling runs/sweeps/scale/table.csv --arm init.gamma
    megagamma fit_scaling TABLE.csv ... --arm init.gamma --baseline 0.5 --form both --size non_embedding --output runs/fit

TABLE.csv is what `megagamma sweep collect` writes. L(N, D) = E + A N^-a + B D^-b is fitted to the held-out loss at the end of
every finished point (of tuned axes the best value), all arms at once with one E, by Huber's loss on log L; --form size or
tokens fits one term alone. Intervals are a bootstrap over points and seeds. An exponent is refused from fewer than four sizes.
It is also said what the fit depends on: the smallest size, Huber's delta, the parameter convention, the largest size left out.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagamma.errors import ConfigurationError
from megagamma.reporting.tables import aligned_table

if TYPE_CHECKING:
    from megagamma.scaling.fit import Form, Law, Observation

SIZES = ("parameters", "non_embedding")


def read_tables(paths: list[Path], arm: list[str], size: str) -> tuple[list[Observation], list[str]]:
    """(observations, warnings) of sweeps' tables.

    Raises:
        ConfigurationError: a table cannot be read, lacks a column, or holds no finished point.
    """
    from megagamma.scaling.fit import Observation

    found, warnings = [], []
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise ConfigurationError(
                f"{path}: cannot be read ({error.strerror}): run megagamma sweep collect"
            ) from error
        needed = ["point", "status", "seed", "set", "tokens", "loss", "is_last", "is_best", size, *arm]
        missing = [column for column in needed if rows and column not in rows[0]]
        if not rows or missing:
            what = "has no column " + ", ".join(missing) if missing else "has no rows"
            raise ConfigurationError(f"{path}: {what}: give the table.csv of a sweep, and axes of it as --arm")
        open_ones = {row["point"] for row in rows if row["status"] != "done"}
        if open_ones:
            warnings.append(
                f"{path}: {len(open_ones)} points are not finished and left out: {', '.join(sorted(open_ones)[:5])}"
            )
        if any(row.get("lr_tuned") == "False" for row in rows):
            warnings.append(f"{path}: learning rates are untuned: exponents then depend on them")
        for row in rows:
            if row["status"] == "done" and row["is_last"] == "True" and row["is_best"] == "True":
                label = ", ".join(f"{column.removeprefix('init.')} {row[column]}" for column in arm) or "all"
                loss = float(row["loss"]) if row["loss"] else math.nan
                found.append(
                    Observation(
                        label, float(row[size]), float(row["tokens"]), loss, int(row["seed"]), row["set"], row["point"]
                    )
                )
    if not found:
        raise ConfigurationError(f"{paths[0]}: holds no finished point: see megagamma sweep status")
    return found, warnings


def _interval(law: Law, laws: list[Law], value: Callable[[Law], float]) -> dict[str, float]:
    from megagamma.scaling.fit import quantiles

    low, high = quantiles([value(one) for one in laws])
    return {"value": value(law), "low": low, "high": high}


def results(
    observations: list[Observation], form: Form, baseline: str, delta: float, draws: int
) -> tuple[dict[str, Any], Law]:
    """Everything that is said of a fit, as JSON takes it."""
    from megagamma.scaling.fit import bootstrap, fit, isoflops, speed_up, without_largest

    law = fit(observations, form, delta)
    laws = bootstrap(observations, law, form, delta, draws)
    arms = list(dict.fromkeys(one.arm for one in observations))
    size, tokens = max(one.size for one in observations), max(one.tokens for one in observations)
    found: dict[str, Any] = {
        "form": form, "points": len(observations), "draws": len(laws), "notes": list(law.notes),
        "irreducible": _interval(law, laws, lambda one: one.irreducible), "arms": {}, "against_baseline": {},
    }  # fmt: skip
    for arm in arms:
        about: dict[str, Any] = {}
        for kind, letter in (("size", "a"), ("tokens", "b")):
            if getattr(law, kind):
                about[letter] = _interval(law, laws, lambda one, k=kind, a=arm: getattr(one, k)[a].exponent)  # type: ignore[misc]
                about[f"{kind}_coefficient"] = getattr(law, kind)[arm].at(1.0)
        found["arms"][arm] = about
        if arm == baseline:
            continue
        against: dict[str, Any] = {
            "speed_up": _interval(law, laws, lambda one, a=arm: speed_up(one, baseline, a, size, tokens)),  # type: ignore[misc]
            "at_size": size, "at_tokens": tokens,
        }  # fmt: skip
        for kind, letter in (("size", "a"), ("tokens", "b")):
            if getattr(law, kind):
                against[f"{letter}_difference"] = _interval(
                    law, laws,
                    lambda one, k=kind, a=arm: getattr(one, k)[a].exponent - getattr(one, k)[baseline].exponent,  # type: ignore[misc]
                )  # fmt: skip
        found["against_baseline"][arm] = against
    found["isoflops"] = isoflops(observations)
    held_out = without_largest(observations, form, delta)
    if held_out is not None:
        found["largest_left_out"] = {"relative_error": held_out[0], "points": held_out[1]}
    return found, law


def sensitivity(
    observations: list[Observation], other: list[Observation], form: Form, delta: float
) -> list[dict[str, Any]]:
    """Exponents under other choices; `other` is the same under the other parameter convention."""
    from megagamma.scaling.fit import check, fit

    kind = "tokens" if form == "tokens" else "size"
    smallest = min(getattr(one, kind) for one in observations)
    choices: list[tuple[str, list[Observation], float]] = [
        ("as asked", observations, delta),
        (f"without the smallest {kind}", [one for one in observations if getattr(one, kind) > smallest], delta),
        ("Huber's delta x 0.1", observations, delta / 10),
        ("Huber's delta x 10", observations, delta * 10),
        ("the other parameter convention", other, delta),
    ]
    rows = []
    for what, chosen, width in choices:
        row: dict[str, Any] = {"choice": what}
        try:
            check(chosen, form)
            law = fit(chosen, form, width)
        except ConfigurationError as error:
            rows.append({**row, "not fitted": str(error)})
            continue
        row["E"] = law.irreducible
        for letter, terms in (("a", law.size), ("b", law.tokens)):
            row |= {f"{letter} {arm}": term.exponent for arm, term in terms.items()}
        rows.append(row)
    return rows


def verdicts(found: dict[str, Any], baseline: str) -> list[str]:
    """A sentence for each arm, from its intervals and never from its values alone."""
    said = []
    for arm, about in found["against_baseline"].items():
        one = about["speed_up"]
        low, high = one["low"], one["high"]
        if low > 1:
            what = "needs fewer FLOPs"
        elif high < 1:
            what = "needs more FLOPs"
        else:
            what = "cannot be told apart in FLOPs"
        said.append(
            f"{arm} {what} for the loss of {baseline} at the largest point: {one['value']:.2f} x, 95 % interval {low:.2f} to "
            f"{high:.2f}."
        )
    return said


def main(arguments: list[str] | None = None) -> int:
    """Read, fit, print, write."""
    parser = argparse.ArgumentParser(
        prog="megagamma fit_scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", type=Path, metavar="TABLE.csv")
    parser.add_argument(
        "--arm", nargs="*", default=[], metavar="AXIS", help="columns that tell arms apart, such as init.gamma"
    )
    parser.add_argument("--baseline", help="arm to compare with, as it is printed (default: the first)")
    parser.add_argument("--form", choices=("both", "size", "tokens"), default="both", help="terms (default: both)")
    parser.add_argument("--size", choices=SIZES, default="non_embedding", help="what N counts (default: %(default)s)")
    parser.add_argument("--delta", type=float, default=1e-3, help="Huber's delta on log L (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=500, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder (default: beside the first table)")
    given = parser.parse_args(arguments)
    if not given.delta > 0 or given.draws < 20:
        raise ConfigurationError(
            f"--delta {given.delta}, --draws {given.draws}: delta must be above 0, draws at least 20"
        )
    from megagamma.files import write_json

    observations, warnings = read_tables(given.tables, given.arm, given.size)
    other, _ = read_tables(given.tables, given.arm, next(size for size in SIZES if size != given.size))
    arms = list(dict.fromkeys(one.arm for one in observations))
    baseline = given.baseline or arms[0]
    if baseline not in arms:
        raise ConfigurationError(f"--baseline {baseline!r}: is not an arm: use one of {', '.join(arms)}")
    found, law = results(observations, given.form, baseline, given.delta, given.draws)
    found |= {
        "size": given.size, "baseline": baseline, "delta": given.delta, "warnings": warnings,
        "sensitivity": sensitivity(observations, other, given.form, given.delta), "verdicts": verdicts(found, baseline),
    }  # fmt: skip
    _print(found)
    output = given.output or given.tables[0].parent
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "fit.json", found)
    _plot(observations, law, output / "fit.png")
    print(f"wrote {output / 'fit.json'} and fit.png")
    return 0


def _text(one: dict[str, float]) -> str:
    return f"{one['value']:.4f} ({one['low']:.4f} to {one['high']:.4f})"


def _print(found: dict[str, Any]) -> None:
    print(f"{found['points']} runs; 95 % intervals by {found['draws']} bootstrap draws over points and seeds")
    print(f"E, shared: {_text(found['irreducible'])} nats per token")
    cells = [
        (arm, *(_text(about[letter]) if letter in about else "-" for letter in "ab"))
        for arm, about in found["arms"].items()
    ]
    print(aligned_table(("arm", "a, of N", "b, of D"), (24, 28, 28), cells))
    for arm, about in found["against_baseline"].items():
        parts = [f"{key.split('_')[0]} {_text(about[key])}" for key in ("a_difference", "b_difference") if key in about]
        print(f"{arm} minus {found['baseline']}: {', '.join(parts)}")
    for one in found["isoflops"]:
        print(f"cross-check, {one['arm']} at {one['flops']:.2g} FLOPs: the parabola's best N is {one['best']}")
    if "largest_left_out" in found:
        one = found["largest_left_out"]
        print(f"left out, the largest is predicted to {one['relative_error']:.2%} ({one['points']} runs)")
    print("what the fit depends on:")
    for row in found["sensitivity"]:
        rest = ", ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{value}"
            for key, value in row.items()
            if key != "choice"
        )
        print(f"  {row['choice']}: {rest}")
    for sentence in found["verdicts"]:
        print(sentence)
    for note in (*found["notes"], *found["warnings"]):
        print(f"WARNING {note}")


def _plot(observations: list[Observation], law: Law, path: Path) -> None:
    """Losses over sizes and over tokens, with the law through the means over seeds, and residuals."""
    from megagamma.reporting.plots import finish_axis, new_figure, save_figure
    from megagamma.scaling.fit import averaged

    means = averaged(observations)
    arms = list(dict.fromkeys(one.arm for one in means))
    figure, axes = new_figure(1, 3, 4.6, 3.8)
    for axis, kind, other in ((axes[0][0], "size", "tokens"), (axes[0][1], "tokens", "size")):
        for index, arm in enumerate(arms):
            own = [one for one in means if one.arm == arm]
            for number, fixed in enumerate(sorted({getattr(one, other) for one in own})):
                line = sorted((one for one in own if getattr(one, other) == fixed), key=lambda one: getattr(one, kind))
                x = [getattr(one, kind) for one in line]
                axis.plot(
                    x,
                    [one.loss for one in line],
                    "o",
                    color=f"C{index}",
                    markersize=4,
                    label=arm if number == 0 else None,
                )
                axis.plot(x, [law.at(arm, one.size, one.tokens) for one in line], color=f"C{index}", linewidth=0.8)
        axis.set_xscale("log")
        # The values themselves: on less than a decade the numbers of minor ticks lie on one another.
        ticks = sorted({getattr(one, kind) for one in means})
        if len(ticks) <= 8:
            axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], fontsize=7)
            axis.set_xticks([], minor=True)
        finish_axis(axis, "N" if kind == "size" else "D [tokens]", "loss [nats/token]")
    for index, arm in enumerate(arms):
        own = [one for one in means if one.arm == arm]
        predicted = [law.at(arm, one.size, one.tokens) for one in own]
        errors = [100 * (one.loss / value - 1) for one, value in zip(own, predicted, strict=True)]
        axes[0][2].plot(predicted, errors, "o", color=f"C{index}", markersize=4, label=arm)
    axes[0][2].axhline(0, color="0.5", linewidth=0.8)
    finish_axis(axes[0][2], "predicted loss [nats/token]", "residual [%]")
    save_figure(figure, path)
