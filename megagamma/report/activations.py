"""Figures of activations: over training, and by layer at the end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from megagamma.report.figures import Figure, grid, small
from megagamma.report.runs import Arm, ReportRun, finite

NUMBERS = {
    "residual_rms": "residual stream, rms",
    "input_norm_attenuation": "left of the first norm's output by epsilon",
    "query_norm_attenuation": "left of the query norm's output",
    "attention_logit_max": "largest attention logit",
    "attention_entropy": "entropy of attention, nats",
    "first_token_attention": "attention to the first token",
    "sink_rate": "sink rate",
    "gate": "mean gate",
    "gate_logit_rms": "gate logits, rms",
}
"""Those that are drawn, and what they are called."""


def _lines(run: ReportRun) -> list[dict[str, Any]]:
    return [line for line in run.dynamics if isinstance(line.get("activations"), dict)]


def _means(run: ReportRun, name: str) -> dict[int, float]:
    """Mean over layers by step."""
    found = {}
    for line in _lines(run):
        values = [numbers[name] for numbers in line["activations"]["layers"].values() if finite(numbers.get(name))]
        if values:
            found[line["step"]] = math.fsum(values) / len(values)
    return found


def _over_seeds(curves: Sequence[dict[int, float]]) -> tuple[list[int], list[float]]:
    """Keys that all curves have, and their means."""
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    return shared, [statistics.fmean(curve[key] for curve in curves) for key in shared]


def over_training(arms: Sequence[Arm]) -> Figure | None:
    """Means over layers, over steps."""
    names = [name for name in NUMBERS if any(_means(run, name) for arm in arms for run in arm.runs)]
    if not names:
        return None
    traces, rows = [], []
    for place, name in enumerate(names):
        for index, arm in enumerate(arms):
            steps, values = _over_seeds([curve for run in arm.runs if (curve := _means(run, name))])
            if steps:
                traces.append(small([step + 1 for step in steps], values, arm, index, place))
                rows += [(name, arm.label, step, value) for step, value in zip(steps, values, strict=True)]
    return Figure(
        "Activations over training",
        "Means over layers and seeds on eight held-out samples. A norm is saturated where less than about 1 is left of its "
        "output; a head has a sink where the first token gets more than 0.3 of its attention.",
        traces,
        grid([NUMBERS[name] for name in names], "step + 1", log_x=True),
        ("number", "arm", "step", "value"),
        rows,
    )


def by_layer(arms: Sequence[Arm]) -> Figure | None:
    """The last measurement, layer by layer."""

    def profile(run: ReportRun, name: str) -> dict[int, float]:
        lines = _lines(run)
        layers = lines[-1]["activations"]["layers"] if lines else {}
        return {int(layer): numbers[name] for layer, numbers in layers.items() if finite(numbers.get(name))}

    names = [name for name in NUMBERS if any(profile(run, name) for arm in arms for run in arm.runs)]
    if not names:
        return None
    traces, rows = [], []
    for place, name in enumerate(names):
        for index, arm in enumerate(arms):
            layers, values = _over_seeds([curve for run in arm.runs if (curve := profile(run, name))])
            if layers:
                traces.append(small(layers, values, arm, index, place))
                rows += [(name, arm.label, layer, value) for layer, value in zip(layers, values, strict=True)]
    return Figure(
        "Activations by layer, at the last measurement",
        "Where in depth norms saturate, sinks sit and gates close; means over heads and seeds.",
        traces,
        grid([NUMBERS[name] for name in names], "layer", log_x=False),
        ("number", "arm", "layer", "value"),
        rows,
    )
