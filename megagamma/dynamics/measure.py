"""One record of a model at a step: numbers by matrix, beside those of a random matrix of the same shape."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megagamma.dynamics.embeddings import Signatures, geometry, random_geometry
from megagamma.dynamics.matrices import Spectrum, measure_matrix, singular_values
from megagamma.dynamics.sources import Drawn, LastUpdate, Snapshot, State
from megagamma.initialization.streams import normal_
from megagamma.model.parameters import LogicalParameter

_HEAD_ROLES = ("query", "key", "value", "attention_output")
_VOCABULARY_ROLES = ("embedding", "head")


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _weights(parameter: LogicalParameter, weight: Tensor, drawn: Drawn | None) -> dict[str, float]:
    """Norm, root mean square, and distance from where it began: |W - W0| and that over |W0|."""
    norm = _norm(weight)
    found = {"norm": norm, "rms": norm / math.sqrt(max(weight.numel(), 1))}
    if drawn is not None:
        initial = drawn.redraw(parameter)
        began = _norm(initial)
        distance = _norm(initial.sub_(weight.cpu()))
        found |= {"distance": distance, "relative_distance": distance / began if began else math.nan}
    return found


def _motion(parameter: LogicalParameter, state: State, last: LastUpdate, drawn: Drawn | None) -> dict[str, float]:
    """The last update by AdamW's own formula from its moments, so that a checkpoint gives what a run does.

    With u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), W = (1 - lr wd) W' - lr u: the update is W - W'.
    """
    weight, first, second = state["weight"], state["exp_avg"], state["exp_avg_sq"]
    rate, (beta1, beta2) = last.learning_rates[parameter.role], last.betas
    root = (second / (1.0 - beta2**last.adam_step)).sqrt_().add_(last.eps)
    step = (first / (1.0 - beta1**last.adam_step)).div_(root).mul_(rate)
    kept = 1.0 - rate * last.weight_decay[parameter.role]
    update = _norm(weight - (weight + step).div_(kept))
    size, count = _norm(weight), math.sqrt(max(weight.numel(), 1))
    found = {
        "update_rms": update / count,
        "update_over_weight": update / size if size else math.nan,
        "exp_avg_rms": _norm(first) / count,
        "exp_avg_sq_rms": _norm(second) / count,
    }
    if drawn is not None and parameter.role != "norm":
        found["update_over_drawn_std"] = found["update_rms"] / drawn.std(parameter)
    return found


def _heads(parameter: LogicalParameter, weight: Tensor, head_dim: int) -> dict[str, list[float]]:
    """Norm and stable rank of every head: rows of queries, keys and values, columns of the output."""
    parts = weight.split(head_dim, dim=1 if parameter.role == "attention_output" else 0)
    ranks = [Spectrum.of(singular_values(part)).stable_rank for part in parts]
    return {"head_norm": [_norm(part) for part in parts], "head_stable_rank": ranks}


@functools.lru_cache(maxsize=256)
def random_baseline(shape: tuple[int, int], spectrum: bool) -> Mapping[str, Any]:
    """The numbers of a random normal matrix of a shape, which has no structure; of small ones the mean of several.

    Its numbers are of std 1: only `singular_values` depend on that.
    """
    draws = 16 if shape[0] * shape[1] <= 1 << 16 else 1
    found = []
    for seed in range(draws):
        out = normal_(torch.empty(shape), seed=seed, name="a random matrix", global_shape=shape, std=1.0)
        found.append(measure_matrix(out, spectrum))
    return {
        key: [math.fsum(at) / draws for at in zip(*(one[key] for one in found), strict=True)]
        if isinstance(first, list)
        else math.fsum(one[key] for one in found) / draws
        for key, first in found[0].items()
    }


def measure(
    snapshot: Snapshot, instruments: Sequence[str], frequent: Signatures | None = None
) -> dict[str, dict[str, Any]]:
    """Numbers of every matrix and gain that this process holds, by logical name.

    Args:
        instruments: of `INSTRUMENTS`.
        frequent: of held-out text, which `embeddings` needs; None: it is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for parameter, state in snapshot.states():
        weight = state["weight"]
        values: dict[str, Any] = {"role": parameter.role, "shape": list(parameter.shape)}
        if "weights" in instruments:
            values |= _weights(parameter, weight, snapshot.drawn)
            if parameter.role != "norm":
                values |= measure_matrix(weight, "spectrum" in instruments)
        if "heads" in instruments and snapshot.head_dim and parameter.role in _HEAD_ROLES:
            values |= _heads(parameter, weight, snapshot.head_dim)
        if "embeddings" in instruments and frequent is not None and parameter.role in _VOCABULARY_ROLES:
            values |= geometry(weight, frequent)
        if "motion" in instruments and snapshot.update is not None and "exp_avg" in state:
            values |= _motion(parameter, state, snapshot.update, snapshot.drawn)
        found[parameter.name] = values
    return found


def baselines(
    matrices: Mapping[str, Mapping[str, Any]], spectrum: bool, frequent: Signatures | None = None
) -> dict[str, dict[str, Any]]:
    """`random_baseline` of every shape among the matrices, by the shape as text, such as 64x32; with `random_geometry`."""
    found: dict[str, dict[str, Any]] = {}
    for values in matrices.values():
        shape = tuple(values["shape"])
        if values["role"] != "norm" and len(shape) == 2 and "condensation" in values:
            found["x".join(map(str, shape))] = dict(random_baseline(shape, spectrum))
        if frequent is not None and "signature_correlation" in values:
            found.setdefault("x".join(map(str, shape)), {}).update(random_geometry(frequent, shape[1]))
    return found


def by_role(matrices: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean of every number over the matrices of a role that have it."""
    sums: dict[str, dict[str, list[float]]] = {}
    for values in matrices.values():
        for key, value in values.items():
            if isinstance(value, float) and math.isfinite(value):
                sums.setdefault(values["role"], {}).setdefault(key, []).append(value)
    return {
        role: {key: math.fsum(numbers) / len(numbers) for key, numbers in keys.items()} for role, keys in sums.items()
    }


def line(
    step: int,
    instruments: Sequence[str],
    matrices: Mapping[str, Mapping[str, Any]],
    seconds: float,
    activations: Mapping[str, Any] | None = None,
    frequent: Signatures | None = None,
) -> dict[str, Any]:
    """A line of dynamics.jsonl or analysis.jsonl, of all matrices of a model."""
    return {
        "step": step,
        "instruments": list(instruments),
        "roles": by_role(matrices),
        "matrices": dict(matrices),
        "baselines": baselines(matrices, "spectrum" in instruments, frequent),
        **({"activations": dict(activations)} if activations else {}),
        "seconds": seconds,
    }


def record(snapshot: Snapshot, instruments: Sequence[str], frequent: Signatures | None = None) -> dict[str, Any]:
    """A line of a model that this process holds whole; see `measure`."""
    began = time.perf_counter()
    matrices = measure(snapshot, instruments, frequent)
    return line(snapshot.step, instruments, matrices, time.perf_counter() - began, frequent=frequent)
