"""Main effects and interactions of axes on the final loss, seed by seed, and how they change with the width.

Every value of an axis is compared with its first. An effect of A is the mean loss at that value less that at the first; an
interaction A x B is half the difference of A's effect at B's value and at its first; and so on, as in any two-level factorial
design. Other axes are averaged over. Below zero the later values are better.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megagamma.scaling.folder import PointState
from megagamma.scaling.grid import SIZE_OPTIONS, Axis, Sweep
from megagamma.scaling.paired import interval
from megagamma.scaling.tuning import best_values, final_loss, is_chosen


@dataclass(frozen=True)
class Effect:
    """One effect, or one interaction."""

    axes: tuple[str, ...]
    """With the value that is compared with the first, where an axis has more than two."""
    at: str
    """Labels of the other axes, such as the size; or `per doubling of the width`."""
    seeds: int
    mean: float
    """Unit: nats per token."""
    low: float
    high: float
    """95 % interval over seeds."""


def factors(sweep: Sweep) -> list[Axis]:
    """Axes with two values or more that set no size and are not tuned."""
    return [
        axis
        for axis in sweep.axes
        if len(axis.arms) > 1 and not axis.is_tuned and not any(option in axis.sets for option in SIZE_OPTIONS)
    ]


def contrast(losses: Mapping[tuple[int, ...], float], chosen: Mapping[int, int]) -> float:
    """The effect of some factors from the losses of all cells.

    Args:
        losses: by the levels of all factors.
        chosen: levels by the places of the factors, each compared with level 0.
    """
    cells = [cell for cell in losses if all(cell[place] in (0, level) for place, level in chosen.items())]
    total = math.fsum(losses[cell] * math.prod(1 if cell[place] else -1 for place in chosen) for cell in cells)
    return total / (len(cells) / 2)


def effects(sweep: Sweep, states: Sequence[PointState]) -> list[Effect]:
    """All effects and interactions of up to three axes, at each of the other axes' arms; none where fewer than two axes have
    two values or more. Only seeds in which every cell has ended count."""
    axes = factors(sweep)
    if len(axes) < 2:
        return []
    best, _ = best_values(sweep, list(states))
    level = {axis.name: {arm.label: index for index, arm in enumerate(axis.arms)} for axis in axes}
    tuned = {axis.name for axis in sweep.axes if axis.is_tuned}
    cells: dict[str, dict[int, dict[tuple[int, ...], float]]] = {}
    widths: dict[str, int] = {}
    for state in states:
        point, loss = state.point, final_loss(state)
        if loss is None or not is_chosen(point, best):
            continue
        others = "-".join(label for name, label in point.labels.items() if name not in level and name not in tuned)
        cell = tuple(level[axis.name][point.labels[axis.name]] for axis in axes)
        cells.setdefault(others, {}).setdefault(point.seed, {})[cell] = loss
        widths[others] = point.sized.model.hidden_size
    found: list[Effect] = []
    size = math.prod(len(axis.arms) for axis in axes)
    for count in range(1, min(3, len(axes)) + 1):
        for places in itertools.combinations(range(len(axes)), count):
            for levels in itertools.product(*(range(1, len(axes[place].arms)) for place in places)):
                chosen = dict(zip(places, levels, strict=True))
                title = tuple(_title(axes[place], level) for place, level in chosen.items())
                of: dict[str, dict[int, float]] = {}
                for others, seeds in cells.items():
                    whole = {seed: losses for seed, losses in seeds.items() if len(losses) == size}
                    of[others] = {seed: contrast(losses, chosen) for seed, losses in whole.items()}
                    if len(whole) > 1:
                        found.append(Effect(title, others, len(whole), *interval(list(of[others].values()))))
                found += _over_width(title, of, widths)
    return found


def _title(axis: Axis, level: int) -> str:
    return axis.name if len(axis.arms) == 2 else f"{axis.name}={axis.arms[level].label}"


def _over_width(title: tuple[str, ...], of: dict[str, dict[int, float]], widths: dict[str, int]) -> list[Effect]:
    """How an effect changes when the width doubles, by a straight line through it over log2 of the width, seed by seed."""
    if len({widths[others] for others in of}) < 2 or len({widths[others] for others in of}) < len(of):
        return []
    seeds = sorted(set.intersection(*(set(values) for values in of.values())))
    if len(seeds) < 2:
        return []
    x = [math.log2(widths[others]) for others in of]
    slopes = [statistics.linear_regression(x, [of[others][seed] for others in of]).slope for seed in seeds]
    return [Effect(title, "per doubling of the width", len(seeds), *interval(slopes))]


def effect_lines(found: Sequence[Effect]) -> list[str]:
    """Effects for the console."""
    return [
        f"{'effect' if len(one.axes) == 1 else 'interaction'} of {' x '.join(one.axes)}{', ' + one.at if one.at else ''}: "
        f"{one.mean:+.4f} nats, 95 % interval {one.low:+.4f} to {one.high:+.4f} ({one.seeds} seeds)"
        for one in found
    ]


def parameter_note(sweep: Sweep, states: Sequence[PointState]) -> str:
    """A line where arms of one size differ in their parameters, such as with and without an output gate; empty: they do not."""
    from megagamma.planning.flops import parameter_counts

    axes = factors(sweep)
    counts: dict[str, set[int]] = {}
    for state in states:
        labels = state.point.labels
        others = "-".join(label for name, label in labels.items() if name not in {axis.name for axis in axes})
        counts.setdefault(others, set()).add(parameter_counts(state.point.sized.model).non_embedding)
    widest = max(counts.values(), key=lambda values: max(values) / min(values), default=set())
    if not widest or max(widest) == min(widest):
        return ""
    share = max(widest) / min(widest) - 1
    return (
        f"arms of one size differ in non-embedding parameters by up to {share:.1%}: a part of an effect may be theirs"
    )
