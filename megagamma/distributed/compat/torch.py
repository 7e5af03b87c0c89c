"""What is needed of torch beyond its public names."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist


def process_groups() -> set[Any]:
    """Every process group of this process. torch's own list is private, and Megatron-core only forgets its groups, where
    each keeps threads and sockets until it is destroyed."""
    return set(dist.distributed_c10d._world.pg_map)


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


@contextlib.contextmanager
def compiled_when_called() -> Iterator[None]:
    """What is imported inside and decorated with `torch.compile` is compiled when it is first called: the compiler is not
    loaded for what nobody calls."""
    whole = torch.compile
    torch.compile = _compiled_when_called  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = whole


def adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.AdamW:
    """torch's AdamW, made and stepped without loading the compiler, which takes a second or two.

    torch loads it to say that it is to leave optimizers alone. Nothing here compiles one. The class stays torch's: DeepSpeed
    warns of any other.
    """
    for method in vars(torch.optim.Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if inspect.isfunction(method) and plain and method.__code__.co_filename == torch._compile.__file__:
            vars(plain).setdefault("__dynamo_disable", plain)  # where the wrapper looks first
    optimizer = torch.optim.AdamW(groups, **options)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    optimizer.step = functools.partial(step, optimizer)  # type: ignore[method-assign]
    return optimizer


@contextlib.contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """This process as one rank of a world whose other ranks do not exist.

    Collectives return at once and leave tensors as they are. All process groups are gone afterwards.

    Raises:
        RuntimeError: this process is in a world already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # also registers the backend "fake"

    if dist.is_initialized():
        raise RuntimeError("a fake world needs a process that is in no other one")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have shape, dtype and device, and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    whole = torch.nn.Module.to
    # It would swap each fake weight for another one, which fails while anything refers to it. All of them are on the
    # device and of the dtype that they are made with.
    torch.nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        # Constants that libraries made on import are real.
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.nn.Module.to = whole  # type: ignore[method-assign]
