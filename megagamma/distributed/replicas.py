"""Are the copies of a weight, its moments and its gradient still the same? Catches silent drift between ranks.

Weights are replicated over data-parallel ranks (under ZeRO 0 to 2), some over tensor-parallel ranks too (norms), and
a tied embedding over two pipeline stages. Rounding aside, which is equal on equal devices, nothing may tell the copies
apart; a missing reduction, a faulty device or a corrupted message does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megagamma.distributed.compat.deepspeed import local_partition
from megagamma.errors import TrainingError
from megagamma.model.parameters import KINDS, MappedTensor

_ROW = 1024


def fingerprint(values: Tensor) -> Tensor:
    """Two 64-bit sums over a tensor's bits, [2] int64, on its device: any single changed bit changes the first, and an
    exchange of rows the second."""
    bits = values.detach().reshape(-1).view(torch.int16 if values.element_size() == 2 else torch.int32)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % _ROW)).view(-1, _ROW)
    rows = padded.sum(1, dtype=torch.int64)
    places = torch.arange(1, rows.numel() + 1, device=rows.device)
    return torch.stack((rows.sum(), (rows * places).sum()))


Values = Callable[[MappedTensor], Tensor]


def _difference(tensors: list[MappedTensor], values: Values, what: str, group: Any, over: str) -> str | None:
    """What differs over the ranks of a group, if anything; a collective of that group."""
    if not tensors or dist.get_world_size(group) == 1:
        return None
    mine = torch.stack([fingerprint(values(tensor)) for tensor in tensors])
    most, least = mine.clone(), mine.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    different = (most != least).any(1)
    if not bool(different.any()):
        return None
    first = tensors[int(different.int().argmax())]
    names = ", ".join(dict.fromkeys(part.logical.name for part in first.parts))
    return (
        f"the copies of {what}{names} differ over the {over} ranks {dist.get_process_group_ranks(group)} "
        f"({int(different.sum())} of {len(tensors)} tensors do): a reduction was missed or a device is faulty; go "
        "back to a checkpoint before this step"
    )


def _weights(tensor: MappedTensor) -> Tensor:
    return local_partition(tensor.parameter)


class _Comparison:
    """Comparisons of one engine's copies. All are made before one is an error: others may wait in the next."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.problem: str | None = None
        tensors = list(engine.map)
        self.over_data = (tensors, engine.runtime.data_group, "data-parallel")
        replicated = [tensor for tensor in tensors if not tensor.is_split]
        self.over_tensor = (replicated, parallel_state.get_tensor_model_parallel_group(), "tensor-parallel")
        tied = engine.config.model.tie_embeddings and engine.pipeline > 1
        embedding = [tensor for tensor in tensors if tensor.role == "embedding"] if tied else []
        group = parallel_state.get_embedding_group() if embedding else None
        self.over_stages = (embedding, group, "pipeline")

    def compare(self, where: tuple[list[MappedTensor], Any, str], values: Values, what: str = "") -> None:
        tensors, group, over = where
        problem = _difference(tensors, values, what, group, over) if tensors else None
        self.problem = self.problem or problem

    def finish(self) -> None:
        """Raise on every rank when any has a problem.

        Raises:
            TrainingError: of the first rank that has one.
        """
        problems = [problem for problem in self.engine.runtime.gather(self.problem) if problem]
        if problems:
            raise TrainingError(problems[0])


def check_replicas(engine: Any) -> None:
    """Compare every replicated weight and moment over the ranks that hold it; all ranks call it, between steps.

    Weights are replicated over data-parallel ranks under ZeRO 0 to 2, moments under ZeRO 0; norms and their moments over
    tensor-parallel ranks, and a tied embedding over two pipeline stages, under any stage.

    Raises:
        TrainingError: on every rank, naming the first weight whose copies differ.
    """
    comparison = _Comparison(engine)
    for kind in KINDS:
        what = "" if kind == "weight" else f"{kind} of "

        def values(tensor: MappedTensor, kind: str = kind) -> Tensor:
            whole: Tensor = engine.state.get(tensor, kind)
            return whole

        if kind == "weight":
            if engine.zero_stage < 3:  # ZeRO 3 partitions the weights, so that there are no copies
                comparison.compare(comparison.over_data, _weights)
            comparison.compare(comparison.over_tensor, _weights)
            comparison.compare(comparison.over_stages, _weights)
        elif engine.zero_stage == 0:
            comparison.compare(comparison.over_data, values, what)
        if kind != "weight" or engine.zero_stage > 0:  # the fp32 masters, too
            comparison.compare(comparison.over_tensor, values, what)
            comparison.compare(comparison.over_stages, values, what)
    comparison.finish()


def check_gradients(engine: Any) -> None:
    """Compare every replicated gradient over the ranks that hold it; all ranks call it, between backward and update.

    Gradients are replicated over data-parallel ranks under ZeRO 0, and those of norms over tensor-parallel ranks and of a
    tied embedding over two stages as the weights are.

    Raises:
        TrainingError: on every rank, naming the first weight whose gradients differ.
    """

    def values(tensor: MappedTensor) -> Tensor:
        gradient = engine.state.gradient(tensor)
        if gradient is None:
            return torch.zeros(1, device=engine.runtime.device)
        return gradient.contiguous()

    comparison = _Comparison(engine)
    if engine.zero_stage == 0:
        comparison.compare(comparison.over_data, values, "the gradient of ")
        comparison.compare(comparison.over_stages, values, "the gradient of ")
    comparison.compare(comparison.over_tensor, values, "the gradient of ")
    comparison.finish()
