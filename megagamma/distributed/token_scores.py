"""Log-probabilities of given tokens and the greedy choice, at every position, through the pipeline schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megagamma.errors import DistributedError

if TYPE_CHECKING:
    from megagamma.distributed.engine import Engine


@torch.no_grad()
def token_scores(engine: Engine, batches: list[dict[str, Tensor]]) -> Tensor:
    """Score this data-parallel rank's microbatches; every rank calls this.

    Args:
        engine: in evaluation mode.
        batches: tokens, labels, position_ids [b, s], as many and of the same shape on every rank; with virtual stages a
            multiple of the number of stages.

    Raises:
        DistributedError: another rank failed before its part was done. A rank's own error is raised as it is. (A rank that
            fails while others wait for it inside the model cannot tell them, as in a training step.)

    Returns:
        [data-parallel ranks, microbatches, b, s, 2] on the CPU, the same on every rank: nats, and a token's number.
    """
    runtime = engine.runtime
    found: list[Tensor] = []
    problem: Exception | None = None
    try:
        found = _run(engine, batches)
    except Exception as error:  # noqa: BLE001 - the other ranks must hear of it before they wait for this one
        problem = error
    if runtime.any_rank(problem is not None):
        raise problem or DistributedError("another rank failed while it scored tokens: see its message")
    result = torch.zeros(runtime.data_size, len(batches), *batches[0]["tokens"].shape, 2, device=runtime.device)
    if runtime.is_last_stage and runtime.tensor_rank == 0:
        result[runtime.data_rank] = torch.stack(found)
    if runtime.size > 1:
        dist.all_reduce(result)
    return result.cpu()


def _run(engine: Engine, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """[b, s, 2] of each microbatch on the last stage, nothing on the others."""
    vocab_size = engine.config.model.vocab_size
    assert vocab_size is not None

    def forward_step(iterator: Iterator[dict[str, Tensor]], chunk: Any, *_: Any) -> tuple[Tensor, Any]:
        inputs = engine._inputs(next(iterator))
        module = engine.deepspeed if engine.hooked else chunk
        output = module(inputs["tokens"], inputs["position_ids"], None)
        return output, lambda output, **_: label_scores(output, inputs["labels"], vocab_size)

    iterators = [iter(batches) for _ in engine.chunks]
    found: list[Tensor] = engine._forward_backward(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=engine.chunks if len(engine.chunks) > 1 else engine.chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0]["tokens"].shape[1],
        micro_batch_size=batches[0]["tokens"].shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found


def label_scores(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Log-softmax at the labels, and the argmax, over a vocabulary that is split over tensor-parallel ranks.

    The logits are never gathered: ranks exchange a number per position. Of equal logits the first counts as the largest.

    Args:
        logits: [b, s, padded vocabulary / t], this rank's slice.
        labels: [b, s].
        vocab_size: true vocabulary; what is beyond it counts for nothing.

    Returns:
        [b, s, 2], fp32, the same on every tensor-parallel rank.
    """
    ranks = parallel_state.get_tensor_model_parallel_world_size()

    def over_ranks(value: Tensor, operation: Any) -> Tensor:
        if ranks > 1:
            dist.all_reduce(value, op=operation, group=parallel_state.get_tensor_model_parallel_group())
        return value

    logits = logits.float()
    size = logits.shape[-1]
    first = parallel_state.get_tensor_model_parallel_rank() * size
    padding = torch.arange(first, first + size, device=logits.device) >= vocab_size
    logits = logits.masked_fill(padding, -math.inf)
    mine, best = logits.max(dim=-1)
    top = over_ranks(mine.clone(), dist.ReduceOp.MAX)
    best = over_ranks(torch.where(mine == top, best + first, 2**31), dist.ReduceOp.MIN)
    total = over_ranks((logits - top.unsqueeze(-1)).exp().sum(dim=-1), dist.ReduceOp.SUM)
    local = labels - first
    chosen = logits.gather(-1, local.clamp(0, size - 1).unsqueeze(-1)).squeeze(-1)
    chosen = over_ranks(torch.where((local >= 0) & (local < size), chosen, 0.0), dist.ReduceOp.SUM)
    return torch.stack((chosen - top - total.log(), best.float()), dim=-1)
