"""Rotary position embedding (RoPE, arXiv 2104.09864), halves not interleaved as in Llama.

Megatron's own rotates through concatenations, counts positions along the window whatever the position ids say, and
computes every layer's cosines anew. Here one table serves all layers of a model chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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


class RotaryTable:
    """Cosines and sines of a model chunk's positions, computed once per length, device and dtype."""

    def __init__(self, head_dim: int, theta: float) -> None:
        """Args: head_dim: even; theta: base of the frequencies theta^(-2i/head_dim)."""
        self.head_dim, self.theta = head_dim, theta
        self.position_ids: Tensor | None = None
        """[b, s]: positions of the batch at hand, where they do not just count along the window."""
        self._known: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _angles(self, positions: Tensor) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device) / self.head_dim
        return positions.float().unsqueeze(-1) * (1.0 / self.theta**exponents)

    def lookup(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for x [s, b, heads, head_dim]: [s, 1 or b, 1, head_dim / 2] in x's dtype."""
        if self.position_ids is not None:
            angles = self._angles(self.position_ids.t()).unsqueeze(2)
            return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        key = (x.shape[0], x.device, x.dtype)
        if key not in self._known:
            angles = self._angles(torch.arange(x.shape[0], device=x.device))[:, None, None]
            self._known[key] = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return self._known[key]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate queries or keys [s, b, heads, head_dim] to their positions."""
        cos, sin = self.lookup(x)
        rotated: Tensor = _Rotate.apply(x, cos, sin)
        return rotated
