"""A model in its engine: its precision, its parts, its weights. Also for what needs no run's folder, such as benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from megagamma.config.schema import Config
from megagamma.distributed.engine import Engine
from megagamma.distributed.partitioned import building
from megagamma.distributed.runtime import Runtime
from megagamma.distributed.state import partition_writer
from megagamma.model.gpt import build_model
from megagamma.model.initialize import fill
from megagamma.model.parameters import ParameterMap
from megagamma.model.regions import compile_regions
from megagamma.training.choices import choose
from megagamma.training.optimizer import parameter_groups


def build(
    config: Config, runtime: Runtime, dtype: torch.dtype, compiled: bool = False
) -> tuple[list[Any], ParameterMap]:
    """This rank's part of the model, unfilled and under ZeRO 3 partitioned already, and its map."""
    compile_regions(compiled)
    with building(config, runtime, dtype):
        chunks: list[Any] = list(build_model(config, dtype, runtime.device))
    return chunks, ParameterMap(chunks, config.model, runtime.tensor_rank, runtime.tensor_size)


def fresh_engine(config: Config, runtime: Runtime) -> Engine:
    """Build this rank's part of the model, fill it, and hand it to DeepSpeed.

    Args:
        config: resolved and validated, vocabulary known.
        runtime: this process, its groups formed.
    """
    choices = choose(config, runtime)
    chunks, parameter_map = build(config, runtime, choices.dtype, choices.compiled)
    fill(parameter_map, config, partition_writer(runtime))
    return Engine(config, runtime, chunks, parameter_map, parameter_groups(parameter_map, config))
