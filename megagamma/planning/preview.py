"""A model looked at before it is built: what initialization would draw, and what the model costs.

The numbers are measured on a sample that is really drawn, by the code that fills real models, from the
streams that a run of this config draws. Nothing of the model's size is allocated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megagamma.config.schema import ROLES, Config, InitConfig
from megagamma.initialization.gamma import SCHEMES, exponent
from megagamma.initialization.report import MatrixReport, WeightStatistics, measure, norm_saturation
from megagamma.model.initialize import draw, parameter_std
from megagamma.model.parameters import LogicalParameter, MappedTensor, Part, logical_parameters
from megagamma.planning.flops import flops_per_token, parameter_counts, tokens_for_budget
from megagamma.planning.memory import plan

SAMPLE_ELEMENTS = 1 << 22  # per role: standard error of the std 0.035 %, and a few seconds for all roles

# Columns of the comparison: name, and the fields of `InitConfig` that make it. The method at two exponents, then the
# baselines, those with a free std at the usual 0.02.
COLUMNS: dict[str, dict[str, Any]] = {
    "gamma 1": {"scheme": "gamma", "gamma": 1.0},
    "gamma 0.5": {"scheme": "gamma", "gamma": 0.5},
    "fixed 0.02": {"scheme": "fixed", "std": 0.02},
    **{name: {"scheme": name, "std": 0.02} for name in SCHEMES if name not in ("gamma", "fixed")},
}


@dataclass
class SampledRow:
    """A matrix, or all matrices of a role: target, and what was measured on a sample."""

    report: MatrixReport
    """`count` is the number of elements drawn; `gamma` is the effective one, depth factor included."""
    matrices: int
    """Matrices that the row stands for."""
    gamma: float | None
    """The scheme's exponent; None where it has none."""


def target_gamma(init: InitConfig, role: str) -> float | None:
    """The exponent of a scheme, before the depth factor; None where it has none."""
    return {"gamma": exponent(init, role), "inverse_sqrt": 0.5}.get(init.scheme)


def _strip(logical: LogicalParameter, elements: int, from_end: bool) -> Part:
    """About `elements` elements of a matrix, at least one row: its first rows, or its last."""
    rows, columns = logical.shape
    count = min(rows, max(1, elements // columns))
    return Part(logical, (rows - count if from_end else 0, 0), (0, count), (columns,))


def _draw(part: Part, config: Config) -> WeightStatistics:
    """Statistics of a part, drawn as into a real model."""
    out = torch.empty(part.shape, dtype=torch.float32)
    # `draw` reads no more of a mapped tensor than its parts.
    draw(MappedTensor("", None, part.shape, (part,)), out, config)  # type: ignore[arg-type]
    return WeightStatistics.of(out)


def sample_rows(config: Config, by_matrix: bool = False, elements: int = SAMPLE_ELEMENTS) -> list[SampledRow]:
    """Target and measured std per role, or per matrix.

    Args:
        config: resolved, vocabulary known.
        by_matrix: one row per matrix in place of one per role; the role's elements are shared out among them.
        elements: drawn per role at most (but one row of every sampled matrix at least). By role, half comes
            from the first rows of the first layer's matrix, half from the last rows of the last layer's.

    Returns:
        Rows in the order of `ROLES`, or of the model.
    """
    found: dict[str, list[LogicalParameter]] = {}
    for logical in logical_parameters(config.model):
        if logical.role != "norm":
            found.setdefault(logical.role, []).append(logical)
    rows = []
    for role in (role for role in ROLES if role in found):
        matrices = found[role]
        if by_matrix:
            groups = [(m.name, 1, [_strip(m, elements // len(matrices), from_end=False)]) for m in matrices]
        else:
            ends = [_strip(matrices[0], elements // 2, False), _strip(matrices[-1], elements // 2, True)]
            if len(matrices) == 1 and 2 * ends[0].shape[0] > matrices[0].shape[0]:
                ends = [_strip(matrices[0], elements, False)]
            groups = [(f"{len(matrices)} x {role}", len(matrices), ends)]
        for name, number, parts in groups:
            total = sum((_draw(part, config) for part in parts), WeightStatistics())
            inputs, target = parameter_std(matrices[0], config)
            report = measure(name, role, matrices[0].shape, inputs, target, total, config.init)
            rows.append(SampledRow(report, number, target_gamma(config.init, role)))
    return rows


def compare_schemes(config: Config) -> dict[str, dict[str, float]]:
    """Target std by role for this config's own init and for every one of `COLUMNS`.

    The schemes take the config's init.depth_scale and init.residual_fan_in, but no exponents of single roles.
    """
    inits = {"this config": config.init}
    inits |= {name: dataclasses.replace(config.init, exponents={}, **fields) for name, fields in COLUMNS.items()}
    first = {logical.role: logical for logical in reversed(logical_parameters(config.model))}
    result: dict[str, dict[str, float]] = {}
    for role in (role for role in ROLES if role in first):
        result[role] = {
            name: parameter_std(first[role], dataclasses.replace(config, init=init))[1] for name, init in inits.items()
        }
    return result


def cost_of(config: Config, world_size: int) -> dict[str, Any]:
    """Parameters, FLOPs, memory per rank and budget of a config, as plain values, units in the names."""
    memory = plan(config, world_size)
    counts = parameter_counts(config.model)
    flops = flops_per_token(config.model, config.data.sequence_length)
    budget = tokens_for_budget(counts.total)
    stages = [{**asdict(s), "device_bytes": s.device_bytes, "fullest": s.items()} for s in memory.stages]
    tokens_per_step = config.data.global_batch_size * config.data.sequence_length
    return {
        "parameters": asdict(counts),
        "flops_per_token": flops,
        "layout": {
            "world_size": world_size,
            "data": memory.data_size,
            "tensor": config.parallel.tensor,
            "pipeline": config.parallel.pipeline,
            "zero_stage": memory.zero_stage,
            "dtype": memory.dtype,
        },
        "largest_rank": stages[memory.worst.pipeline_stage],
        "stages": stages,
        "tokens_per_step": tokens_per_step,
        "budget_tokens": budget,
        "budget_steps": -(-budget // tokens_per_step),
        "budget_flops": flops * budget,
    }


def inspect(config: Config, world_size: int, by_matrix: bool = False, compare: bool = False) -> dict[str, Any]:
    """Everything above in one dictionary, as written by `--json`.

    Args:
        config: resolved and validated for `world_size`, vocabulary known.
        world_size: number of processes.
        by_matrix: one row of the initialization table per matrix.
        compare: also the target stds of every scheme.
    """
    rows = sample_rows(config, by_matrix)
    stds = {row.report.role: row.report.asked_std for row in rows}
    result = {
        "model": asdict(config.model),
        "init": asdict(config.init),
        "matrices": [
            {
                **{key: value for key, value in asdict(row.report).items() if key not in ("gamma", "count")},
                "matrices": row.matrices,
                "gamma": row.gamma,
                "effective_gamma": row.report.gamma,
                "sampled_elements": row.report.count,
            }
            for row in rows
        ],
        "norms": [
            asdict(row)
            for row in norm_saturation(config.model.hidden_size, config.model.norm_epsilon, config.model.qk_norm, stds)
        ],
        "cost": cost_of(config, world_size),
    }
    if compare:
        result["asked_std_by_scheme"] = compare_schemes(config)
    return result
