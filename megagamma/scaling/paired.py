"""Differences between two arms of a sweep, seed by seed: what seeds share cancels, and few of them say more."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from megagamma.scaling.folder import PointState
from megagamma.scaling.grid import Sweep
from megagamma.scaling.tuning import final_loss

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


def paired_differences(sweep: Sweep, states: Sequence[PointState]) -> list[dict[str, Any]]:
    """For each axis that is not tuned, and each pair of its values: final validation losses, second minus first, per seed.

    Returns:
        Rows of axis, first, second, others (labels of the other axes), seeds, mean, low, high; losses in nats. Only where two
        seeds or more have finished in both arms.
    """
    losses: dict[tuple[tuple[str, str], ...], dict[int, float]] = {}
    for state in states:
        loss = final_loss(state)
        if loss is not None:
            losses.setdefault(tuple(state.point.labels.items()), {})[state.point.seed] = loss
    rows = []
    tuned = {axis.name for axis in sweep.axes if axis.is_tuned}
    for axis in (axis for axis in sweep.grid if axis.name not in tuned):
        for first, second in itertools.combinations([arm.label for arm in axis.arms], 2):
            for labels, of_first in losses.items():
                if (axis.name, first) not in labels:
                    continue
                others = [label for name, label in labels if name != axis.name]
                twin = tuple((name, second if name == axis.name else label) for name, label in labels)
                of_second = losses.get(twin, {})
                differences = [of_second[seed] - loss for seed, loss in of_first.items() if seed in of_second]
                if len(differences) < 2:
                    continue
                mean, low, high = interval(differences)
                rows.append({
                    "axis": axis.name, "first": first, "second": second, "others": "-".join(others),
                    "seeds": len(differences), "mean": mean, "low": low, "high": high,
                })  # fmt: skip
    return rows


def paired_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows for the console."""
    return [
        f"{row['second']} minus {row['first']}{' at ' + row['others'] if row['others'] else ''}: {row['mean']:+.4f} nats, "
        f"95 % interval {row['low']:+.4f} to {row['high']:+.4f} ({row['seeds']} seeds, paired)"
        for row in rows
    ]
