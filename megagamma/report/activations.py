"""Figures of activations: over training, and by layer at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from megagamma.report.figures import Figure, grid, mean_by_key, small
from megagamma.report.runs import Arm, ReportRun, finite

NUMBERS = {
    "residual_rms": "residual stream, rms",
    "massive_activation": "largest activation over rms",
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


def _profile(run: ReportRun, name: str) -> dict[int, float]:
    """By layer, at the last measurement."""
    lines = _lines(run)
    layers = lines[-1]["activations"]["layers"] if lines else {}
    return {int(layer): numbers[name] for layer, numbers in layers.items() if finite(numbers.get(name))}


def _figure(
    arms: Sequence[Arm], curve_of: Callable[[ReportRun, str], dict[int, float]], over: str, title: str, reading: str
) -> Figure | None:
    """A small plot for each number that was measured, over `step` or `layer`."""
    names = [name for name in NUMBERS if any(curve_of(run, name) for arm in arms for run in arm.runs)]
    if not names:
        return None
    by_step = over == "step"
    traces, rows = [], []
    for place, name in enumerate(names):
        for index, arm in enumerate(arms):
            mean = mean_by_key([curve for run in arm.runs if (curve := curve_of(run, name))])
            if mean:
                traces.append(small([key + by_step for key in mean], list(mean.values()), arm, index, place))
                rows += [(name, arm.label, key, value) for key, value in mean.items()]
    layout = grid([NUMBERS[name] for name in names], "step + 1" if by_step else over, log_x=by_step)
    return Figure(title, reading, traces, layout, ("number", "arm", over, "value"), rows)


def over_training(arms: Sequence[Arm]) -> Figure | None:
    """Means over layers, over steps."""
    return _figure(
        arms,
        _means,
        "step",
        "Activations over training",
        "Means over layers and seeds on eight held-out samples. A norm is saturated where less than about 1 is left of its "
        "output; a head has a sink where the first token gets more than 0.3 of its attention.",
    )


def by_layer(arms: Sequence[Arm]) -> Figure | None:
    """The last measurement, layer by layer."""
    return _figure(
        arms,
        _profile,
        "layer",
        "Activations by layer, at the last measurement",
        "Where in depth norms saturate, sinks sit and gates close; means over heads and seeds.",
    )
