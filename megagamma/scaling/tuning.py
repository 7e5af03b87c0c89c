"""Tuned axes: which value is best, whether it may lie beyond the grid, and which point is so far behind that it is ended."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megagamma.scaling.folder import PointState
from megagamma.scaling.grid import Axis, StopLost, Sweep
from megagamma.scaling.options import is_number
from megagamma.scaling.points import Point


def validation_key(metrics: list[dict[str, Any]]) -> str | None:
    """Key of the loss on the first validation set; None where nothing was validated."""
    keys = (key for line in metrics for key in line if key.startswith("val/") and key.endswith("/loss"))
    return next(keys, None)


def last_loss(metrics: list[dict[str, Any]]) -> float | None:
    """The last loss on the first validation set, or of training where nothing was validated. Unit: nats per token.

    None where there is none, or where it is not finite (metrics.jsonl has null then).
    """
    name = validation_key(metrics) or "loss"
    loss = next((line[name] for line in reversed(metrics) if name in line), None)
    return loss if loss is not None and math.isfinite(loss) else None


def final_loss(state: PointState) -> float | None:
    """Loss at the end of a finished point; None for any other. Unit: nats per token."""
    return last_loss(state.metrics) if state.status == "done" else None


def tuned_learning_rates(sweep: Sweep, points: Sequence[Point]) -> dict[str, bool]:
    """Whether the learning rate is tuned, by `Point.comparison`: a tuned axis gives its points several of them."""
    rates: dict[str, set[float]] = {}
    for point in points:
        rates.setdefault(point.comparison, set()).add(point.config.optimizer.lr)
    has_axis = any(axis.is_tuned and "optimizer.lr" in axis.sets for axis in sweep.axes)
    return {name: has_axis and len(values) > 1 for name, values in rates.items()}


def learning_rate_line(sweep: Sweep, points: Sequence[Point]) -> str:
    """Which of the compared arms have a tuned learning rate."""
    is_tuned = tuned_learning_rates(sweep, points)
    doubt = "a difference between arms may be one of learning rates"
    if not any(is_tuned.values()):
        return f"learning rate: untuned: one value per arm and size; {doubt}"
    axis = next(axis for axis in sweep.axes if axis.is_tuned and "optimizer.lr" in axis.sets)
    values = ", ".join(str(arm.value) for arm in axis.arms)
    kind = "factors of its rule" if axis.arms[0].factor else "values"
    line = f"learning rate: tuned per arm and size over the {kind} {values}"
    untuned = [name for name, tuned in is_tuned.items() if not tuned]
    return f"{line}; untuned, with one value, in {some(untuned)}: {doubt}" if untuned else line


def some(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Candidate:
    """Points that differ in their seed only, as one of the values of tuned axes."""

    def __init__(self, members: list[PointState]) -> None:
        self.members, self.point = members, members[0].point
        self.losses = {m.point.seed: loss for m in members if (loss := final_loss(m)) is not None}
        self.states = {member.status for member in members}
        self.mean = statistics.fmean(self.losses.values()) if len(self.losses) == len(members) else None

    def is_known_worse(self, best: _Candidate) -> bool:
        """Whether it has a result, and no better one than the best.

        One that diverged, or ended with a loss that is not finite, has. One that was ended early as behind has too, unless
        it is better in the mean of the seeds in which it was not.
        """
        if "diverged" in self.states or self.states == {"done"}:
            return True
        both = [seed for seed in self.losses if seed in best.losses]
        gaps = [self.losses[seed] - best.losses[seed] for seed in both]
        return self.states <= {"done", "behind"} and (not gaps or statistics.fmean(gaps) >= 0)

    def describe(self, tuned: Sequence[Axis]) -> str:
        """Its values, and why it has no mean."""
        values = " x ".join(str(self.point.values[axis.name]) for axis in tuned)
        unfinished = [member for member in self.members if member.status != "done"]
        seeds = (
            "" if len(unfinished) == len(self.members) else f" in {some([f'seed {m.point.seed}' for m in unfinished])}"
        )
        return f"{values} ({', '.join(sorted({m.status for m in unfinished}))}{seeds})"


def is_chosen(point: Point, best: Mapping[str, str]) -> bool:
    """Whether a point has the best values of its tuned axes, or none that is tuned; `best` is from `best_values`."""
    return not point.tuned or best.get(point.comparison) == point.group


def best_values(sweep: Sweep, states: list[PointState]) -> tuple[dict[str, str], list[str]]:
    """Of every group of tuned points, the best values by the mean over seeds of the final validation loss.

    A value without a finished point of every seed is none of the candidates; one that diverged never is.

    Returns:
        Name without seed of the best point by `Point.comparison`; and warnings: values that are best at an edge of those that
        have a result, values without a finished point of every seed, and groups without a result.
    """
    tuned = [axis for axis in sweep.axes if axis.is_tuned]
    groups: dict[str, dict[str, list[PointState]]] = {}
    for state in states:
        groups.setdefault(state.point.comparison, {}).setdefault(state.point.group, []).append(state)
    best, warnings = {}, []
    names = ", ".join(axis.name for axis in tuned)
    for group, members in groups.items() if tuned else ():
        candidates = [_Candidate(one) for one in members.values()]
        means = {one.point.group: one.mean for one in candidates if one.mean is not None}
        if not means:
            warnings.append(f"{group}: no value of {names} has finished points of every seed")
            continue
        best[group] = min(means, key=lambda name: means[name])
        leader = next(one for one in candidates if one.point.group == best[group])
        unknown = [one for one in candidates if not one.is_known_worse(leader)]
        if unknown:
            warnings.append(
                f"{group}: without finished points of every seed: {names} {some([one.describe(tuned) for one in unknown])}: "
                "the best is one of the others"
            )
        explored = [one for one in candidates if one not in unknown]
        warnings += [text for axis in tuned if (text := _edge_warning(group, axis, leader, explored))]
    return best, warnings


def _edge_warning(group: str, axis: Axis, best: _Candidate, explored: list[_Candidate]) -> str:
    """That the best value lies at an edge of those with a result, other tuned axes at their best; empty where it does not."""
    values = {arm.label: arm.value for arm in axis.arms}
    others = [name for name in best.point.tuned if name != axis.name]
    labels = {
        one.point.labels[axis.name]
        for one in explored
        if all(one.point.labels[name] == best.point.labels[name] for name in others)
    }
    here, value = best.point.labels[axis.name], best.point.values[axis.name]
    if len(labels) == 1:
        why = "is the only one" if len(axis.arms) == 1 else "is the only one with a result"
    elif not all(is_number(values[label]) for label in labels):
        return ""  # names have no order
    else:
        ordered = sorted(labels, key=lambda label: float(values[label]))
        if here not in (ordered[0], ordered[-1]):
            return ""
        why = f"lies at the {'lower' if here == ordered[0] else 'upper'} edge of its grid"
        if len(labels) < len(values):
            why += f" (of the values with a result: {', '.join(ordered)})"
    return f"{group}: the best {axis.name}, {value}, {why}: the optimum may lie beyond: add values"


def is_lost(state: PointState, states: list[PointState], rule: StopLost) -> bool:
    """Whether a point of a tuned axis is behind the best of its group by the rule's margin.

    The group: points that differ from it in tuned axes only. It is compared with each at equal tokens, at the last
    validation that both have, which must not lie before the rule's share of the run. One that diverged, or whose loss was
    ever not finite, ends no other; nor does a training loss.
    """
    name = validation_key(state.metrics)
    if name is None:
        return False
    begin = rule.after * state.point.tokens
    ours = losses_by_tokens(state, name)
    for other in states:
        if other is state or other.point.tuning_group != state.point.tuning_group or _has_diverged(other, name):
            continue
        theirs = losses_by_tokens(other, name)
        common = [tokens for tokens in ours if tokens >= begin and tokens in theirs]
        if common and ours[max(common)] > theirs[max(common)] + rule.margin:
            return True
    return False


def losses_by_tokens(state: PointState, name: str) -> dict[int, float]:
    """A validation loss by the tokens that were seen."""
    return {line["tokens"]: line[name] for line in state.metrics if line.get(name) is not None}


def _has_diverged(state: PointState, name: str) -> bool:
    """Whether a point diverged: a validation loss is not finite, or the last loss of training. These are null in its file."""
    losses = [line[name] for line in state.metrics if name in line]
    losses += [line["loss"] for line in state.metrics[-1:] if "loss" in line]
    return state.status == "diverged" or any(loss is None or not math.isfinite(loss) for loss in losses)
