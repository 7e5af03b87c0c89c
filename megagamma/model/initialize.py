"""Fills a built model with its initial weights through the map, and measures what was drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagamma.config.schema import Config
from megagamma.initialization.gamma import ModelShape, asked, truncation
from megagamma.initialization.report import MatrixReport, WeightStatistics, measure
from megagamma.initialization.streams import normal_
from megagamma.model.parameters import LogicalParameter, MappedTensor, ParameterMap, Part

Drawn = dict[str, WeightStatistics]
"""Statistics of what was drawn, by logical name."""


def part_std(part: Part, config: Config) -> float:
    """Target std of the matrix that a part belongs to."""
    return parameter_std(part.logical, config)[1]


def parameter_std(logical: LogicalParameter, config: Config) -> tuple[int, float]:
    """d_in and target std of a logical matrix."""
    shape = ModelShape(config.model.hidden_size, config.model.num_layers)
    return asked(config.init, logical.role, logical.shape, shape)


def draw(tensor: MappedTensor, out: Tensor, config: Config) -> None:
    """Fill `out`, of the local tensor's shape, with its initial values: draws by part, ones for gains."""
    for part in tensor.parts:
        view = part.view(out)
        if part.logical.role == "norm":
            view.fill_(1.0)
        else:
            normal_(
                view,
                seed=config.run.seed,
                name=part.logical.name,
                global_shape=part.logical.shape,
                start=part.start,
                std=part_std(part, config),
                truncate=truncation(config.init),
            )


@torch.no_grad()
def fill(
    parameter_map: ParameterMap, config: Config, write: Callable[[MappedTensor, Tensor], None] | None = None
) -> Drawn:
    """Fill this rank's weights, and mark which are split.

    Args:
        parameter_map: of the built model.
        config: the run's.
        write: stores a whole local tensor in a weight that was partitioned while it was built (ZeRO 3).

    Returns:
        Statistics of what this rank drew, by logical name; sum them over the ranks of the model with `report_drawn`.
    """
    parameter_map.mark_tensor_parallel()
    drawn: Drawn = {}
    for tensor in parameter_map:
        values = tensor.parameter.data
        if tensor.is_partitioned:
            values = torch.empty(tensor.shape, dtype=values.dtype, device=values.device)
        draw(tensor, values, config)
        if tensor.is_partitioned:
            assert write is not None
            write(tensor, values)
        for part in tensor.parts:
            if part.logical.role != "norm":
                statistics = WeightStatistics.of(part.view(values))
                drawn[part.logical.name] = drawn.get(part.logical.name, WeightStatistics()) + statistics
    return drawn


def report_drawn(
    drawn: dict[str, WeightStatistics],
    config: Config,
    gather: Callable[[dict[str, tuple[int, float, float]]], list[dict[str, Any]]],
) -> list[MatrixReport]:
    """Compare what all ranks of the model drew with the target stds.

    Args:
        drawn: this rank's statistics from `fill`.
        config: the run's.
        gather: collects a JSON value, the three sums by name, of the ranks that hold one copy of the model, this one's
            included.

    Returns:
        One report per logical matrix, in the model's order. A tied embedding that two pipeline stages hold is
        counted twice, which leaves its mean and std as they are.
    """
    from megagamma.model.parameters import logical_parameters

    total: Drawn = {}
    for one in gather({name: (found.count, found.total, found.square) for name, found in drawn.items()}):
        for name, sums in one.items():
            total[name] = total.get(name, WeightStatistics()) + WeightStatistics(*sums)
    reports = []
    for logical in logical_parameters(config.model):
        if logical.role == "norm":
            continue
        inputs, target = parameter_std(logical, config)
        reports.append(
            measure(logical.name, logical.role, logical.shape, inputs, target, total[logical.name], config.init)
        )
    return reports
