"""The loss of every token from its logits, piece by piece, whose gradient overwrites the logits.

torch's own makes three more tensors of the logits' size, in fp32: with a vocabulary they are the largest of a step, and on a
CPU each is written to memory that the kernel first has to clear. Here a piece stays in a shared cache, and nothing of the
logits' size is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements of a piece. Smaller ones stay in a core's own cache, and wake its threads so often that two are slower than torch.
CPU_PIECE, GPU_PIECE = 1 << 21, 1 << 26


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        normalizer = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
        rows = max(1, (CPU_PIECE if logits.device.type == "cpu" else GPU_PIECE) // vocab_size)
        for piece, out in zip(logits.split(rows), normalizer.split(rows), strict=True):
            torch.logsumexp(piece[:, :vocab_size].float(), dim=-1, out=out)
        ctx.save_for_backward(logits, labels, normalizer)
        ctx.rows, ctx.vocab_size = rows, vocab_size
        return normalizer - logits.gather(1, labels.unsqueeze(1)).squeeze(1).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # A second backward pass over what was overwritten is an error: autograd sees that a saved tensor has changed.
        logits, labels, normalizer = ctx.saved_tensors
        pieces = [x.split(ctx.rows) for x in (logits, labels, normalizer, gradients[0].float())]
        for piece, label, total, gradient in zip(*pieces, strict=True):
            true, scale = piece[:, : ctx.vocab_size], gradient.unsqueeze(1)
            work = true if piece.dtype == torch.float32 else true.float()
            work.sub_(total.unsqueeze(1)).exp_().mul_(scale)
            work.scatter_add_(1, label.unsqueeze(1), -scale)
            if work is not true:
                true.copy_(work)
            piece[:, ctx.vocab_size :].zero_()
        return logits, None, None


def cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Loss of every token, computed in fp32.

    Args:
        logits: [n, padded vocabulary]; a backward pass overwrites them with their gradient.
        labels: [n], each below `vocab_size`.
        vocab_size: columns that count; the others get the gradient 0.

    Returns:
        [n], fp32. Unit: nats.
    """
    return _CrossEntropy.apply(logits, labels, vocab_size)  # type: ignore[no-any-return, no-untyped-call]
