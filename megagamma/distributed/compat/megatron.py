"""What is needed of Megatron-core beyond its public names: the places where it names CUDA, on a CPU."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megagamma.distributed.compat.torch import compiled_when_called


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


@contextlib.contextmanager
def own_groups_only() -> Iterator[None]:
    """Let Megatron-core make the groups that this rank is in and no others, of which nothing would stay here anyway.

    And enumerate the ranks of all groups once for all ranks that are laid out inside. Of 8,192 ranks, there are 22,561
    groups, and a rank is in 17. Only for a world that is not real: in a real one every rank makes every group.
    """
    from megatron.core import parallel_state

    create, enumerate_ranks = parallel_state.create_group, parallel_state.generate_masked_orthogonal_rank_groups

    def create_own(ranks: Sequence[int] | None = None, *arguments: Any, **named: Any) -> Any:
        if ranks is not None and dist.get_rank() not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return create(ranks, *arguments, **named)

    @functools.cache
    def remembered(world_size: int, sizes: tuple[int, ...], mask: tuple[bool, ...]) -> Any:
        return enumerate_ranks(world_size, list(sizes), list(mask))

    parallel_state.create_group = create_own
    parallel_state.generate_masked_orthogonal_rank_groups = lambda world_size, parallel_size, mask: remembered(
        world_size, tuple(parallel_size), tuple(mask)
    )
    try:
        yield
    finally:
        parallel_state.create_group = create
        parallel_state.generate_masked_orthogonal_rank_groups = enumerate_ranks


def preload() -> None:
    """Import Megatron-core without torch's compiler and without wandb. Optional; before anything else imports it.

    Megatron-core decorates functions with `torch.compile` when it is imported. That alone loads the compiler, in about as
    much time as all the rest, also where none of these functions is ever called, as on a CPU. Here they are compiled when
    they are first called. wandb is for Megatron-core's inference engine, which nobody runs here.
    """
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment] # an ImportError for whoever imports it
    try:
        with compiled_when_called():
            import megatron.core  # noqa: F401
    finally:
        if hidden:
            del sys.modules["wandb"]
