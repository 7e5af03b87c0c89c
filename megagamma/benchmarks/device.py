"""Training steps on one device, without a contender: tokens per second, peak memory, and MFU. Made for a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from megagamma.benchmarks.training import join, random_batch

_WARM_UP = 3  # steps
FORMULA = (
    "MFU = tokens/s x FLOPs per token / peak FLOP/s; FLOPs per token = 6 x (matrices + head) "
    "+ 12 x layers x heads x head_dim x sequence / 2, without recomputation (PaLM, appendix B, causal)"
)


def measure_device(arguments: Sequence[str], steps: int) -> dict[str, Any]:
    """Train on random tokens in this process, which must not have joined a run before.

    Args:
        arguments: options of the run; `--run.device` says where.
        steps: measured, after three that are not.

    Returns:
        device, dtype and shape, tokens per second (median), peak memory of the allocator (resident, on a CPU), and MFU with
        what it is made of; `peak_flops` is the data sheet's, on a CPU measured, and MFU None where it is not known.
    """
    import torch

    from megagamma.planning.flops import (
        flops_per_token,
        known_peak_flops,
        measure_matmul_peak,
        model_flops_utilization,
        parameter_counts,
    )
    from megagamma.training.assembly import fresh_engine

    config, runtime = join(arguments)
    engine = fresh_engine(config, runtime)
    engine.set_learning_rate(1e-4)
    data, on_gpu = config.data, runtime.device.type == "cuda"
    batches = [random_batch(config)] * (data.global_batch_size // data.micro_batch_size)
    seconds = []
    for _ in range(_WARM_UP + steps):
        begin = time.perf_counter()
        loss = engine.forward_backward(batches)
        engine.step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    tokens = data.global_batch_size * data.sequence_length
    rate = tokens / statistics.median(seconds[_WARM_UP:])
    name = torch.cuda.get_device_name(runtime.device) if on_gpu else "cpu"
    peak = known_peak_flops(name) if on_gpu else measure_matmul_peak(engine.dtype)
    flops = flops_per_token(config.model, data.sequence_length)
    return {
        "device": name,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "zero_stage": engine.zero_stage,
        "parameters": parameter_counts(config.model).total,
        "sequence_length": data.sequence_length,
        "micro_batch_size": data.micro_batch_size,
        "last_loss": loss,
        "tokens_per_second": rate,
        "peak_gib": runtime.memory_bytes() / 2**30,
        "flops_per_token": flops,
        "peak_flops": peak,
        "mfu": model_flops_utilization(rate * flops, peak),
        "formula": FORMULA,
    }
