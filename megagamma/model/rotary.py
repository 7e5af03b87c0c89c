"""Rotary position embedding (RoPE, arXiv 2104.09864), halves not interleaved as in Llama.

Megatron's own rotates through concatenations, counts positions along the sequence whatever the position ids say, and
computes every layer's cosines anew. Here one table serves all layers of a model chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagamma.model.regions import Region


class _Rotate(torch.autograd.Function):
    """x1, x2 -> x1 cos - x2 sin, x2 cos + x1 sin, with x1 and x2 the halves of the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # A rotation's transpose is the rotation back.
        return _rotate(gradients[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x1, x2), (out1, out2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)
    return out


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """`rotate` as a formula."""
    (x1, x2), (cos, sin) = x.chunk(2, dim=-1), table
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


ROTATION = Region(lambda x, table: _Rotate.apply(x, table[0], table[1]), rotated)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys to their positions.

    Args:
        x: [s, b, heads, head_dim].
        table: from `RotaryTable`, [2, s, 1 or b, 1, head_dim / 2].
    """
    y: Tensor = ROTATION(x, table)
    return y


class RotaryTable(torch.nn.Module):
    """Cosines and sines of a batch's positions, in the place of Megatron's rotary embedding.

    `GPT.forward` says which positions the batch has; Megatron asks for the table in the same call and hands it to every
    layer as an argument, so that a layer that is computed again in the backward pass sees the table of its own microbatch.
    """

    def __init__(self, head_dim: int, theta: float, dtype: torch.dtype) -> None:
        """Args: head_dim: even; theta: base of the frequencies theta^(-2i/head_dim); dtype: of queries and keys."""
        super().__init__()
        self.head_dim, self.theta, self.dtype = head_dim, theta, dtype
        self._position_ids: Tensor | None = None
        self._consecutive = True
        self._tables: dict[tuple[int, torch.device], Tensor] = {}

    def set_positions(self, position_ids: Tensor, consecutive: bool) -> None:
        """Positions of the batch at hand.

        Args:
            position_ids: int64 [b, s].
            consecutive: every row counts 0, 1, ..., s - 1, so that one table serves all of this length.
        """
        self._position_ids, self._consecutive = position_ids, consecutive

    def _compute(self, positions: Tensor) -> Tensor:
        """[s, b] -> [2, s, b, 1, head_dim / 2]."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device) / self.head_dim
        angles = (positions.float().unsqueeze(-1) * (1.0 / self.theta**exponents)).unsqueeze(2)
        return torch.stack((angles.cos(), angles.sin())).to(self.dtype)

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        """Megatron asks; the answer comes back to `forward`, which has the positions themselves."""
        return 0

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """The table of the batch at hand: [2, s, 1 or b, 1, head_dim / 2]."""
        assert self._position_ids is not None
        if not self._consecutive:
            return self._compute(self._position_ids.t())
        key = (self._position_ids.shape[1], self._position_ids.device)
        if key not in self._tables:
            self._tables[key] = self._compute(torch.arange(key[0], device=key[1]).unsqueeze(1))
        return self._tables[key]
