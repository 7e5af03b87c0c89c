"""What a process holds of a model's tensors: all of a plain one, a box of a distributed one; drawn where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megagamma.adapters.blocks import Block
from megagamma.errors import InitializationError


@dataclass(frozen=True)
class LocalTensor:
    """This process's part of a tensor."""

    values: Tensor
    """Memory of the part; writing to it changes the model."""
    start: tuple[int, ...]
    """Its first index by axis in the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""

    def pieces(self, blocks: tuple[Block, ...]) -> Iterator[tuple[Block, tuple[int, int], Tensor]]:
        """(block, first element in its logical matrix, view (out, in)) of what lies here of each block."""
        for block in blocks:
            index, offset = [], []
            for (first, last), begin, size in zip(block.box, self.start, self.values.shape, strict=True):
                low, high = max(first, begin), min(last, begin + size)
                if low >= high:
                    break
                index.append(slice(low - begin, high - begin))
                offset.append(low - first)
            else:
                view = self.values[tuple(index)].flatten(0, -2) if len(index) > 2 else self.values[tuple(index)]
                row, column = offset[-2:]
                if block.transposed:
                    view, row, column = view.t(), column, row
                yield block, (block.start[0] + row, block.start[1] + column), view


def is_distributed(parameter: Tensor) -> bool:
    """Whether a tensor is torch's DTensor, as FSDP2 makes them."""
    return type(parameter).__name__ == "DTensor" and hasattr(parameter, "to_local")


def local_tensor(name: str, parameter: Tensor) -> LocalTensor:
    """This process's part of a parameter.

    Raises:
        InitializationError: it is sharded in a way that torch does not tell the place of.
    """
    shape = tuple(parameter.shape)
    if not is_distributed(parameter):
        return LocalTensor(parameter.detach(), (0,) * len(shape), shape)
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    distributed = parameter
    placements = distributed.placements  # type: ignore[attr-defined]
    strided = any(type(one).__name__ == "_StridedShard" for one in placements)
    if strided or any(isinstance(one, Partial) for one in placements):
        raise InitializationError(
            f"{name}: is distributed as {placements}, of which torch does not tell where a part lies: draw the model before "
            "tensor parallelism and FSDP are combined on it"
        )
    size, start = compute_local_shape_and_global_offset(shape, distributed.device_mesh, placements)  # type: ignore[attr-defined]
    local: Tensor = distributed.to_local().detach()  # type: ignore[attr-defined]
    if tuple(local.shape) != tuple(size):
        raise InitializationError(f"{name}: holds {tuple(local.shape)} of {shape}, and torch says {tuple(size)}")
    return LocalTensor(local, tuple(start), shape)


def storage_span(parameter: Tensor) -> tuple[int, int] | None:
    """Addresses of the first and past-last byte of a parameter's memory; None where it has none yet."""
    local = parameter.to_local() if is_distributed(parameter) else parameter  # type: ignore[attr-defined]
    if local.device.type == "meta" or local.numel() == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    begin = local.data_ptr()
    return begin, begin + (last + 1) * torch.empty((), dtype=local.dtype).element_size()
