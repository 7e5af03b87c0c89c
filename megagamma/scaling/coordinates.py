"""Coordinate check: how activations, logits and updates depend on the width, under any scheme of initialization.

Source of the check: arXiv 2203.03466, appendix D.1 [REF]. Under a rule that transfers over widths each number stays as it is;
here its exponent over the width is reported, by least squares on logarithms, and its spread, the largest over the smallest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megagamma.errors import ConfigurationError
from megagamma.runs.folder import RunFolder

HEAD_DIM = 16
"""Heads are added with the width, so that attention's scale has nothing to follow."""
NUMBERS = {
    "residual_first": "residual stream after the first layer, rms",
    "residual_last": "residual stream after the last layer, rms",
    "attention_logits": "attention logits, rms",
    "logits": "logits, rms",
    "embedding_update": "update of the embedding, rms",
    "hidden_update": "update of hidden matrices, rms",
    "head_update": "update of the head, rms",
}
_HIDDEN = ("query", "key", "value", "gate", "attention_output", "mlp_gate", "mlp_up", "mlp_down")


@dataclass(frozen=True)
class Coordinate:
    """One number of one run."""

    scheme: str
    width: int
    seed: int
    step: int
    number: str
    value: float


@dataclass(frozen=True)
class Dependence:
    """How a number depends on the width at a step."""

    scheme: str
    number: str
    step: int
    exponent: float
    """Of the width."""
    spread: float
    """Largest over smallest, of the means over seeds."""


def scheme_options(text: str) -> dict[str, Any]:
    """Options of a scheme as it is given: a name of `init.scheme`, `gamma=0.5`, or several such as `gamma=1,head=0.5`.

    Raises:
        ConfigurationError: it is none of these.
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if not value:
            found["init.scheme"] = key
            continue
        name = key if "." in key else f"init.{key}"
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    if not text or any(not name.partition(".")[2] for name in found):
        raise ConfigurationError(f"--schemes {text!r}: give a scheme's name, gamma=NUMBER, or options with values")
    return found


def study(
    config: str, schemes: Sequence[str], widths: Sequence[int], seeds: Sequence[int], steps: int, rate: float
) -> dict[str, Any]:
    """The check as a sweep: every step measured, one learning rate throughout.

    Raises:
        ConfigurationError: fewer than two widths, or one that heads do not divide.
    """
    if len(set(widths)) < 2:
        raise ConfigurationError(f"--widths {' '.join(map(str, widths))}: give at least two different ones")
    for width in widths:
        if width < HEAD_DIM or width % HEAD_DIM:
            raise ConfigurationError(f"--widths {width}: must be a multiple of {HEAD_DIM}, the width of a head")
    return {
        "name": "coordinates",
        "config": config,
        "set": {
            "run.steps": steps, "optimizer.lr": rate, "schedule.shape": "constant", "schedule.warmup_steps": 0,
            "dynamics.interval": 1, "dynamics.instruments": ["activations", "motion"], "model.head_dim": HEAD_DIM,
            "logging.sample_tokens": 0, "validation.interval": 0, "precision.dtype": "fp32", "logging.wandb": "disabled",
        },
        "axes": {
            "scheme": {text.replace("=", "").replace(",", "-"): scheme_options(text) for text in schemes},
            "width": {
                f"d{width}": {
                    "model.hidden_size": width, "model.ffn_hidden_size": 3 * width,
                    "model.num_attention_heads": width // HEAD_DIM, "model.num_query_groups": width // HEAD_DIM,
                }
                for width in sorted(set(widths))
            },
        },
        "seeds": list(seeds),
        "arms": ["scheme"],
    }  # fmt: skip


def coordinates(run: RunFolder, scheme: str) -> list[Coordinate]:
    """The numbers of a run's steps, from its dynamics.jsonl."""
    config = run.read_config()
    found = []
    for line in run.dynamics().read():
        layers, roles = line["activations"]["layers"], line["roles"]
        ordered = [layers[key] for key in sorted(layers, key=int)]
        values: dict[str, float | None] = {
            "residual_first": ordered[0]["residual_rms"],
            "residual_last": ordered[-1]["residual_rms"],
            "attention_logits": statistics.fmean(layer["attention_logit_rms"] for layer in ordered),
            "logits": line["activations"]["output"]["logit_rms"],
            "embedding_update": roles.get("embedding", {}).get("update_rms"),
            "head_update": roles.get("head", {}).get("update_rms"),
        }
        hidden = [roles[role]["update_rms"] for role in _HIDDEN if "update_rms" in roles.get(role, {})]
        values["hidden_update"] = statistics.fmean(hidden) if hidden else None
        found += [
            Coordinate(scheme, config.model.hidden_size, config.run.seed, line["step"], number, value)
            for number, value in values.items()
            if value is not None and math.isfinite(value) and value > 0
        ]
    return found


def slope(points: Mapping[int, float]) -> float:
    """Exponent of a number over the width, by least squares on logarithms; not a number from fewer than two widths."""
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(
        [math.log(width) for width in points], [math.log(value) for value in points.values()]
    ).slope


def dependences(found: Sequence[Coordinate]) -> list[Dependence]:
    """Of every scheme, number and step, over means of the seeds."""
    values: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    for one in found:
        values.setdefault((one.scheme, one.number, one.step), {}).setdefault(one.width, []).append(one.value)
    rows = []
    for (scheme, number, step), widths in values.items():
        means = {width: statistics.fmean(of_seeds) for width, of_seeds in sorted(widths.items())}
        if len(means) > 1:
            rows.append(Dependence(scheme, number, step, slope(means), max(means.values()) / min(means.values())))
    return rows
