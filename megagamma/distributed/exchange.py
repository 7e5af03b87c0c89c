"""Small values between processes, as JSON in tensors. Nothing here is a pickle, which could run code on arrival.

    found = gather_json({"seconds": 0.5}, size=4, device=device, all_gather=runtime_all_gather)

Tuples arrive as lists, on the rank that sent them too, so that every rank sees the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagamma import errors
from megagamma.errors import DistributedError, MegagammaError


def _check_keys(value: Any) -> None:
    """JSON would turn other keys into text without a word."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{key!r} is no text: only text can be a key of what ranks exchange")
            _check_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_keys(item)


def pack(value: Any) -> Tensor:
    """A JSON value as its UTF-8 bytes, uint8 [n]. Floats keep every bit.

    Raises:
        TypeError: JSON has no word for it.
    """
    _check_keys(value)
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def unpack(data: Tensor) -> Any:
    """The value behind `pack`'s bytes."""
    return json.loads(bytes(data.cpu().numpy()))


def gather_json(value: Any, size: int, device: torch.device, all_gather: Callable[[Tensor], Tensor]) -> list[Any]:
    """A small JSON value of every process, by rank; a collective.

    Args:
        size: processes.
        device: on which tensors travel.
        all_gather: gives an equally shaped tensor [n] of every process, one after the other.
    """
    data = pack(value)
    if size == 1:
        return [unpack(data)]
    counts = all_gather(torch.tensor([data.numel()], device=device)).flatten().tolist()
    padded = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data.to(device)
    rows = all_gather(padded).reshape(size, -1)
    return [unpack(row[:count]) for row, count in zip(rows, counts, strict=True)]


def broadcast_json(value: Any, device: torch.device, is_source: bool) -> Any:
    """Rank 0's JSON value on every rank; a collective. Other ranks' `value` is not looked at."""
    data = pack(value) if is_source else torch.empty(0, dtype=torch.uint8)
    count = torch.tensor([data.numel()], device=device)
    dist.broadcast(count, src=0)
    data = data.to(device) if is_source else torch.empty(int(count), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return unpack(data)


def describe_error(error: BaseException) -> dict[str, Any]:
    """An exception as a JSON value: our own by its class in `megagamma.errors`, any other by its name and message."""
    if isinstance(error, MegagammaError):
        # A class of another module, such as one for empty files, travels as the class that it is derived from.
        names = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
        return {"kind": next(names), "message": str(error), "on_one_rank": error.on_one_rank}
    return {"kind": "", "message": f"{type(error).__name__}: {error}", "on_one_rank": False}


def restore_error(about: dict[str, Any], where: str = "") -> MegagammaError:
    """The exception that `describe_error` described; what was none of ours is a DistributedError.

    Args:
        where: put before the message.
    """
    found = getattr(errors, about["kind"], None)
    kind = found if isinstance(found, type) and issubclass(found, MegagammaError) else DistributedError
    error = kind(where + about["message"])
    if about["on_one_rank"]:
        error.on_one_rank = True
    return error
