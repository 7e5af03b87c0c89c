"""A model in its engine: its precision, its parts, its weights. Also for what needs no run's folder, such as benchmarks."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch

from megagamma.config.resolve import planned_dtype
from megagamma.config.schema import Config
from megagamma.distributed.engine import Engine
from megagamma.distributed.partitioned import building
from megagamma.distributed.runtime import Runtime
from megagamma.distributed.state import partition_writer
from megagamma.model.gpt import build_model
from megagamma.model.initialize import fill
from megagamma.model.parameters import ParameterMap
from megagamma.training.optimizer import parameter_groups


def choose_dtype(config: Config, data_parallel_size: int, device: torch.device) -> tuple[torch.dtype, str | None]:
    """`precision.dtype` as a dtype, and a warning with the measured ratio for bf16 on a CPU."""
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    if planned_dtype(config, data_parallel_size, kind) == "fp32":
        return torch.float32, None
    if kind == "cuda":
        return torch.bfloat16, None
    ratio = matmul_speed(torch.bfloat16) / matmul_speed(torch.float32)
    advice = "use --precision.dtype fp32" if ratio < 1 else "which loses precision against fp32"
    return (
        torch.bfloat16,
        f"precision.dtype=bf16 on a CPU: its matrix products run at {ratio:.2f} x fp32 here: {advice}",
    )


def matmul_speed(dtype: torch.dtype, size: int = 512, repeats: int = 3) -> float:
    """Best rate of a few square matrix products on the CPU. Unit: FLOP/s."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def build(config: Config, runtime: Runtime, dtype: torch.dtype) -> tuple[list[Any], ParameterMap]:
    """This rank's part of the model, unfilled and under ZeRO 3 partitioned already, and its map."""
    with building(config, runtime, dtype):
        chunks: list[Any] = list(build_model(config, dtype, runtime.device))
    return chunks, ParameterMap(chunks, config.model, runtime.tensor_rank, runtime.tensor_size)


def fresh_engine(config: Config, runtime: Runtime) -> Engine:
    """Build this rank's part of the model, fill it, and hand it to DeepSpeed.

    Args:
        config: resolved and validated, vocabulary known.
        runtime: this process, its groups formed.
    """
    dtype, _warning = choose_dtype(config, runtime.data_size, runtime.device)
    chunks, parameter_map = build(config, runtime, dtype)
    fill(parameter_map, config, partition_writer(runtime))
    return Engine(config, runtime, chunks, parameter_map, parameter_groups(parameter_map, config.optimizer))
