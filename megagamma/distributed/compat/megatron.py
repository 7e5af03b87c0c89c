"""What is needed of Megatron-core beyond its public names: the places where it names CUDA, on a CPU."""

from __future__ import annotations

from typing import Any

import torch


class _TorchOnCPU:
    """The torch module with `zeros(device="cuda")` made on the CPU, for Megatron's schedules."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, device="cpu" if device == "cuda" else device, **kwargs)


def run_on_cpu() -> None:
    """Redirect the places where Megatron-core names CUDA. Idempotent; only for processes whose run is on a CPU."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random

    if isinstance(schedules.torch, _TorchOnCPU):
        return
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    schedules.torch = _TorchOnCPU()
    # Random states of activation checkpointing. There is no dropout, so nothing is drawn from them.
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    megatron_random.get_cuda_rng_tracker().states_["model-parallel-rng"] = torch.get_rng_state()
