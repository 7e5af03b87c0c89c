"""Differences between two arms of a sweep, seed by seed: what seeds share cancels, and few of them say more."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megagamma.scaling.folder import PointState
from megagamma.scaling.grid import Sweep
from megagamma.scaling.tuning import best_values, final_loss, is_chosen

_ALL_PAIRS = 4  # values of an axis; of more, the pairs are too many to read
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, that of the last is on the safe side.
_STUDENT_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % interval of the mean by Student's t; not a number at the ends of a single value.

    Source: W. S. Gosset, The probable error of a mean, Biometrika 6 (1908).
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    quantile = _STUDENT_95[min(len(values) - 1, len(_STUDENT_95)) - 1]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired_differences(
    sweep: Sweep, states: Sequence[PointState], value: Callable[[PointState], float | None] | None = None
) -> list[dict[str, Any]]:
    """For each axis that is not tuned, and each pair of its values: a result of theirs, second minus first, per seed.

    Values of an axis of more than four are compared with its first alone. Of a tuned axis only the best value of each arm
    counts, by the final validation loss.

    Args:
        value: of a point; None: it has none. Default: the final validation loss, in nats per token.

    Returns:
        Rows of axis, first, second, others (labels of the other axes), seeds, mean, low, high; in the unit of the value. Only
        where two seeds or more have finished in both arms.
    """
    value = value or final_loss
    tuned = {axis.name for axis in sweep.axes if axis.is_tuned}
    best = best_values(sweep, list(states))[0] if tuned else {}
    found: dict[tuple[tuple[str, str], ...], dict[int, float]] = {}
    for state in states:
        point, number = state.point, value(state)
        if number is None or not is_chosen(point, best):
            continue
        labels = tuple((name, label) for name, label in point.labels.items() if name not in tuned)
        found.setdefault(labels, {})[point.seed] = number
    rows = []
    for axis in (axis for axis in sweep.grid if axis.name not in tuned):
        pairs = list(itertools.combinations([arm.label for arm in axis.arms], 2))
        for first, second in pairs if len(axis.arms) <= _ALL_PAIRS else pairs[: len(axis.arms) - 1]:
            for labels, of_first in found.items():
                if (axis.name, first) not in labels:
                    continue
                others = [label for name, label in labels if name != axis.name]
                twin = tuple((name, second if name == axis.name else label) for name, label in labels)
                of_second = found.get(twin, {})
                differences = [of_second[seed] - number for seed, number in of_first.items() if seed in of_second]
                if len(differences) < 2:
                    continue
                mean, low, high = interval(differences)
                rows.append({
                    "axis": axis.name, "first": first, "second": second, "others": "-".join(others),
                    "seeds": len(differences), "mean": mean, "low": low, "high": high,
                })  # fmt: skip
    return rows


def paired_lines(rows: Sequence[dict[str, Any]], unit: str = "nats") -> list[str]:
    """The rows for the console."""
    return [
        f"{row['second']} minus {row['first']}{' at ' + row['others'] if row['others'] else ''}: {row['mean']:+.4f} {unit}, "
        f"95 % interval {row['low']:+.4f} to {row['high']:+.4f} ({row['seeds']} seeds, paired)"
        for row in rows
    ]


def score_differences(
    sweep: Sweep, states: Sequence[PointState], scores: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Paired differences of every benchmark's metrics between arms.

    Args:
        scores: rows of `run` (the name of a point's folder), `task`, `metric` and `value`, one of each.

    Returns:
        Rows of `paired_differences` with task and metric.
    """
    rows = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in scores):
        of = {row["run"]: row["value"] for row in scores if (row["task"], row["metric"]) == (task, metric)}
        found = paired_differences(sweep, states, functools.partial(_by_folder, of))
        rows += [{"task": task, "metric": metric, **row} for row in found]
    return rows


def _by_folder(values: Mapping[str, float], state: PointState) -> float | None:
    return values.get(state.folder.name)
