"""Log-probabilities of given tokens and the most likely token, over a vocabulary split over tensor-parallel ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


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
    largest, best = logits.max(dim=-1)
    top = over_ranks(largest.clone(), dist.ReduceOp.MAX)
    best = over_ranks(torch.where(largest == top, best + first, 2**31), dist.ReduceOp.MIN)
    total = over_ranks((logits - top.unsqueeze(-1)).exp().sum(dim=-1), dist.ReduceOp.SUM)
    local = labels - first
    chosen = logits.gather(-1, local.clamp(0, size - 1).unsqueeze(-1)).squeeze(-1)
    chosen = over_ranks(torch.where((local >= 0) & (local < size), chosen, 0.0), dist.ReduceOp.SUM)
    return torch.stack((chosen - top - total.log(), best.float()), dim=-1)
