"""Where the scale of initialization is critical: every operational reading of it, from the runs of a sweep over gamma.

The paper names "a critical initialization that balances the reasoning and training" [P] and its value and definition are not
known (docs/claims.md). These are our readings of the words [INF], each with its interval over seeds:

    loss        the gamma of the lowest final loss
    balance     the same among those that reach a given loss in at most so many times the baseline's tokens
    context     the gamma of the lowest final loss on tokens that context decides
    boundary    the gamma at which hidden matrices have moved as far as they were long, |W - W0| = |W0|: the boundary between
                the linear and the condensed regime of arXiv 2007.07497 [REF], at one width
    drift       the gamma at which that distance stops to depend on the width (from three widths)
    stability   the largest gamma below which no run spiked or diverged
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from megagamma.errors import ConfigurationError
from megagamma.runs.folder import RunFolder
from megagamma.scaling.coordinates import slope
from megagamma.scaling.folder import PointState
from megagamma.scaling.paired import interval
from megagamma.scaling.tuning import final_loss, validation_key

HIDDEN = ("query", "key", "value", "attention_output", "mlp_gate", "mlp_up", "mlp_down")


@dataclass(frozen=True)
class Trial:
    """One run of the search."""

    gamma: float
    rate: float
    seed: int
    width: int
    loss: float | None
    """Final held-out loss; None: it diverged, or was ended since it could not win."""
    curve: tuple[tuple[float, float], ...] = ()
    """(tokens, held-out loss) by ascending tokens."""
    distance: float | None = None
    """Mean over hidden matrices of |W - W0| / |W0| at the end."""
    spikes: int = 0
    """Spikes and losses that were not finite; a run that diverged counts one."""
    context_loss: float | None = None
    """Final loss on tokens that context decides."""


def trial_of(state: PointState) -> Trial | None:
    """A point of a search as a trial; None: it has not ended."""
    if state.status not in ("done", "diverged", "behind"):
        return None
    run, config = RunFolder(state.folder), state.point.sized
    key = validation_key(state.metrics) or "loss"
    curve = tuple((line["tokens"], line[key]) for line in state.metrics if isinstance(line.get(key), float))
    lines = [line for line in run.dynamics().read() if line.get("step")]
    roles = lines[-1]["roles"] if lines else {}
    moved = [roles[role]["relative_distance"] for role in HIDDEN if "relative_distance" in roles.get(role, {})]
    spikes = sum(event.get("event") in ("spike", "nan") for event in run.events().read())
    return Trial(
        config.init.gamma, config.optimizer.lr, state.point.seed, config.model.hidden_size, final_loss(state), curve,
        statistics.fmean(moved) if moved and state.status == "done" else None,
        max(spikes, int(state.status == "diverged")),
    )  # fmt: skip


def _end(rate: float, tried: Collection[float]) -> str:
    """Whether a learning rate is the smallest or largest of several tried; empty: neither, or it is the only one."""
    if len(tried) < 2 or min(tried) < rate < max(tried):
        return ""
    return "smallest" if rate == min(tried) else "largest"


def best_rates(trials: Sequence[Trial]) -> tuple[dict[tuple[int, float], float], list[str]]:
    """(learning rate of the lowest mean loss by width and gamma, warnings where it is the smallest or largest tried).

    Rates are compared on the seeds that all of a gamma's rates were tried with; one counts only where it has a loss on each.
    """
    found: dict[tuple[int, float], float] = {}
    warnings = []
    for key in dict.fromkeys((one.width, one.gamma) for one in trials):
        of: dict[float, dict[int, float | None]] = {}
        for one in trials:
            if (one.width, one.gamma) == key:
                of.setdefault(one.rate, {})[one.seed] = one.loss
        shared = set.intersection(*(set(losses) for losses in of.values()))
        means: dict[float, float] = {}
        for rate, losses in sorted(of.items()):
            known = [loss for seed, loss in losses.items() if seed in shared and loss is not None]
            if known and len(known) == len(shared):
                means[rate] = statistics.fmean(known)
        if not means:
            warnings.append(f"gamma {key[1]:g} at width {key[0]}: no run ended with a loss: try lower learning rates")
            continue
        found[key] = min(means, key=means.__getitem__)
        lost = sorted(seed for seed, loss in of[found[key]].items() if loss is None)
        if lost:
            warnings.append(
                f"gamma {key[1]:g} at width {key[0]}: seeds {', '.join(map(str, lost))} of its best learning rate, "
                f"{found[key]:g}, have no loss, and are left out"
            )
        where = _end(found[key], of)
        if where:
            warnings.append(
                f"gamma {key[1]:g} at width {key[0]}: its best learning rate, {found[key]:g}, is the {where} tried"
            )
    return found, warnings


def beyond(trials: Sequence[Trial]) -> dict[tuple[int, float], float]:
    """By width and gamma, half the smallest or twice the largest learning rate tried, where that was the best of several."""
    tried: dict[tuple[int, float], set[float]] = {}
    for one in trials:
        tried.setdefault((one.width, one.gamma), set()).add(one.rate)
    return {
        key: best / 2 if end == "smallest" else best * 2
        for key, best in best_rates(trials)[0].items()
        if (end := _end(best, tried[key]))
    }


@dataclass(frozen=True)
class Reading:
    """What one gamma came to at its best learning rate, at one width."""

    gamma: float
    rate: float
    losses: Mapping[int, float]
    """By seed."""
    times: Mapping[int, float] = field(default_factory=dict)
    """Tokens to the target loss, over those of the baseline, by seed; infinite: never reached."""
    distances: Mapping[int, float] = field(default_factory=dict)
    contexts: Mapping[int, float] = field(default_factory=dict)
    spikes: int = 0
    runs: int = 0


def tokens_to(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """Tokens at which a curve first reaches a loss, linear between validations; infinite where it does not."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return after if high <= low else before + (after - before) * (high - max(loss, low)) / (high - low)
    return math.inf


def readings(trials: Sequence[Trial], width: int, baseline: float) -> list[Reading]:
    """Of every gamma at a width, by ascending gamma.

    The target loss of `times` is what the baseline has at half of its run, seed by seed.

    Raises:
        ConfigurationError: the baseline has no finished run.
    """
    rates, _ = best_rates(trials)
    if (width, baseline) not in rates:
        raise ConfigurationError(f"gamma {baseline:g}, the baseline, has no finished run at width {width}")
    chosen = {
        gamma: [one for one in trials if (one.width, one.gamma, one.rate) == (width, gamma, rates[width, gamma])]
        for at, gamma in sorted(rates)
        if at == width
    }
    targets: dict[int, tuple[float, float]] = {}
    for one in chosen[baseline]:
        if len(one.curve) >= 3:
            half = one.curve[-1][0] / 2
            loss = next(loss for tokens, loss in one.curve if tokens >= half)
            targets[one.seed] = (loss, tokens_to(one.curve, loss))
    found = []
    for gamma, own in chosen.items():
        found.append(
            Reading(
                gamma,
                rates[width, gamma],
                {one.seed: one.loss for one in own if one.loss is not None},
                {
                    one.seed: tokens_to(one.curve, targets[one.seed][0]) / targets[one.seed][1]
                    for one in own
                    if one.seed in targets
                },
                {one.seed: one.distance for one in own if one.distance is not None},
                {one.seed: one.context_loss for one in own if one.context_loss is not None},
                sum(one.spikes > 0 for one in trials if (one.width, one.gamma) == (width, gamma)),
                sum((one.width, one.gamma) == (width, gamma) for one in trials),
            )
        )
    return found


def lowest(values: Mapping[float, float]) -> tuple[float, bool]:
    """(gamma of the lowest value, whether it lies inside the range): by a parabola through the lowest and its neighbours."""
    gammas = sorted(values)
    place = min(range(len(gammas)), key=lambda index: values[gammas[index]])
    if place in (0, len(gammas) - 1):
        return gammas[place], False
    (x0, y0), (x1, y1), (x2, y2) = ((gammas[index], values[gammas[index]]) for index in (place - 1, place, place + 1))
    below, above = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    if below == above:
        return x1, True
    vertex = x1 - 0.5 * ((x1 - x0) * below - (x1 - x2) * above) / (below - above)
    return min(max(vertex, x0), x2), True


def crossing(values: Mapping[float, float], level: float) -> float | None:
    """The first gamma at which values cross a level, linear between gammas; None: they do not."""
    gammas = sorted(values)
    for low, high in itertools.pairwise(gammas):
        first, second = values[low] - level, values[high] - level
        if first == 0:
            return low
        if first * second < 0:
            return low + (high - low) * first / (first - second)
    return None


@dataclass(frozen=True)
class Critical:
    """One reading of the critical gamma."""

    reading: str
    gamma: float | None
    """None: it lies outside of what was tried, or was not measured."""
    low: float
    high: float
    """95 % interval over seeds; not a number with one seed."""
    note: str


def _over_seeds(name: str, values: Mapping[int, float | None], note: str, missing: str) -> Critical:
    known = [value for value in values.values() if value is not None]
    if not known or len(known) < len(values):
        lost = ", ".join(str(seed) for seed, value in values.items() if value is None)
        of = f"of seeds {lost} " if known else ""
        return Critical(name, None, math.nan, math.nan, of + missing)
    mean, low, high = interval(known)
    return Critical(name, mean, low, high, note if len(known) > 1 else f"{note}; one seed: not a finding")


def _by_seed(found: Sequence[Reading], number: str) -> dict[int, dict[float, float]]:
    """Values by seed and gamma, of the seeds that every gamma has."""
    maps = [getattr(one, number) for one in found]
    seeds = sorted(set.intersection(*(set(one) for one in maps))) if maps else []
    return {seed: {one.gamma: getattr(one, number)[seed] for one in found} for seed in seeds}


def critical(found: Sequence[Reading], slower: float) -> list[Critical]:
    """All readings at one width.

    Args:
        slower: tokens to the target loss that `balance` allows, over the baseline's.
    """
    widen = "at an edge of the gammas tried: widen --gammas"

    def inside(values: Mapping[float, float]) -> float | None:
        gamma, is_inside = lowest(values) if len(values) > 2 else (math.nan, False)
        return gamma if is_inside else None

    losses = {seed: inside(values) for seed, values in _by_seed(found, "losses").items()}
    rows = [_over_seeds("loss", losses, "lowest final loss", widen)]
    fast = [one for one in found if one.times and statistics.fmean(one.times.values()) <= slower]
    if len(fast) == len(found):
        balance = Critical(
            "balance", rows[0].gamma, rows[0].low, rows[0].high, f"every gamma is at most {slower:g} x as slow"
        )
    else:
        ordered = {one.gamma: statistics.fmean(one.losses.values()) for one in fast if one.losses}
        best = min(ordered, key=ordered.__getitem__) if ordered else None
        note = f"lowest final loss among gammas that are at most {slower:g} x as slow to the baseline's loss at half of its run"
        balance = Critical("balance", best, math.nan, math.nan, note)
    rows.append(balance)
    contexts = {seed: inside(values) for seed, values in _by_seed(found, "contexts").items()}
    rows.append(
        _over_seeds(
            "context",
            contexts,
            "lowest final loss on tokens that context decides",
            widen if contexts else "not measured",
        )
    )
    distances = {seed: crossing(values, 1.0) for seed, values in _by_seed(found, "distances").items()}
    missing = "no gamma tried crosses it" if distances else "not measured"
    rows.append(_over_seeds("boundary", distances, "|W - W0| = |W0| in hidden matrices at the end", missing))
    stable = [one.gamma for one in found if one.spikes == 0]
    first_bad = min((one.gamma for one in found if one.spikes), default=math.inf)
    largest = max((gamma for gamma in stable if gamma < first_bad), default=None)
    note = (
        "no run spiked or diverged at any gamma"
        if len(stable) == len(found)
        else "largest gamma below which no run spiked"
    )
    rows.append(Critical("stability", largest, math.nan, math.nan, note))
    return rows


def drift(trials: Sequence[Trial]) -> tuple[dict[float, float], Critical]:
    """(exponent of the distance over the width by gamma, where it crosses 0), from three widths or more, means over seeds."""
    rates, _ = best_rates(trials)
    moved: dict[float, dict[int, list[float]]] = {}
    for one in trials:
        if one.distance is not None and rates.get((one.width, one.gamma)) == one.rate:
            moved.setdefault(one.gamma, {}).setdefault(one.width, []).append(one.distance)
    exponents = {
        gamma: slope({width: statistics.fmean(values) for width, values in sorted(widths.items())})
        for gamma, widths in sorted(moved.items())
        if len(widths) >= 3
    }
    where = crossing(exponents, 0.0) if len(exponents) > 1 else None
    note = (
        "the distance stops to depend on the width"
        if where
        else "needs three widths, and gammas on both sides: --widths"
    )
    return exponents, Critical("drift", where, math.nan, math.nan, note)


def finer(found: Sequence[Reading]) -> list[float]:
    """Gammas to try next: halfway between the one of the lowest mean loss and its neighbours."""
    means = {one.gamma: statistics.fmean(one.losses.values()) for one in found if one.losses}
    gammas = sorted(means)
    place = gammas.index(min(means, key=means.__getitem__))
    beside = [gammas[index] for index in (place - 1, place + 1) if 0 <= index < len(gammas)]
    return sorted(round((gammas[place] + one) / 2, 4) for one in beside)
