"""Are the copies of a weight still the same? Catches silent drift between ranks.

Weights are replicated over data-parallel ranks (under ZeRO 0 to 2), some over tensor-parallel ranks too (norms), and
a tied embedding over two pipeline stages. Rounding aside, which is equal on equal devices, nothing may tell the copies
apart; a missing reduction, a faulty device or a corrupted message does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megagamma.distributed.compat.deepspeed import local_partition
from megagamma.errors import TrainingError
from megagamma.model.parameters import MappedTensor

_ROW = 1024


def fingerprint(values: Tensor) -> Tensor:
    """Two 64-bit sums over a tensor's bits, [2] int64, on its device: any single changed bit changes the first, and an
    exchange of rows the second."""
    bits = values.detach().reshape(-1).view(torch.int16 if values.element_size() == 2 else torch.int32)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % _ROW)).view(-1, _ROW)
    rows = padded.sum(1, dtype=torch.int64)
    places = torch.arange(1, rows.numel() + 1, device=rows.device)
    return torch.stack((rows.sum(), (rows * places).sum()))


def _compare(tensors: list[MappedTensor], group: Any, over: str) -> None:
    """Raise when any of the tensors differs over the ranks of a group."""
    if not tensors or dist.get_world_size(group) == 1:
        return
    mine = torch.stack([fingerprint(local_partition(tensor.parameter)) for tensor in tensors])
    most, least = mine.clone(), mine.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    different = (most != least).any(1)
    if bool(different.any()):
        first = tensors[int(different.int().argmax())]
        names = ", ".join(dict.fromkeys(part.logical.name for part in first.parts))
        raise TrainingError(
            f"the copies of {names} differ over the {over} ranks {dist.get_process_group_ranks(group)} "
            f"({int(different.sum())} of {len(tensors)} tensors do): a reduction was missed or a device is faulty; go "
            "back to a checkpoint before this step"
        )


def check_replicas(engine: Any) -> None:
    """Compare every replicated weight over the ranks that hold it; all ranks call it.

    Raises:
        TrainingError: on the ranks that hold it, naming the first weight whose copies differ.
    """
    tensors = list(engine.map)
    if engine.zero_stage < 3:  # ZeRO 3 partitions the weights, so that there are no copies
        _compare(tensors, engine.runtime.data_group, "data-parallel")
    replicated = [tensor for tensor in tensors if not tensor.is_split]
    _compare(replicated, parallel_state.get_tensor_model_parallel_group(), "tensor-parallel")
    if engine.config.model.tie_embeddings and engine.pipeline > 1:
        embedding = [tensor for tensor in tensors if tensor.role == "embedding"]
        if embedding:
            _compare(embedding, parallel_state.get_embedding_group(), "pipeline")
