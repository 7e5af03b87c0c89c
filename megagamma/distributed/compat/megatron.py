"""What is needed of Megatron-core beyond its public names: the places where it names CUDA, on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def _compiled_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile`, which does nothing before the first call of what it decorates."""
    if function is None:
        return functools.partial(_compiled_when_called, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, **options)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call


def preload() -> None:
    """Import Megatron-core without torch's compiler. Optional, and useful before anything else imports Megatron-core.

    Megatron-core decorates functions with `torch.compile` when it is imported. That alone loads the compiler, in about as
    much time as all the rest, also where none of these functions is ever called, as on a CPU. Here they are compiled when
    they are first called.
    """
    whole = torch.compile
    torch.compile = _compiled_when_called  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = whole
