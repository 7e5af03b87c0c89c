"""Causal attention through torch, and on a CPU in bf16 with a backward pass of matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Scores of one piece: enough work for each call, in a shared cache.
_PIECE = 1 << 22
LONGEST = 512
"""Tokens up to which the products are faster than torch's backward pass: they are made of the forbidden half too."""


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on Megatron's shapes: flash attention where torch has it.

    Args:
        query: [s, b, heads, head_dim]; key, value: [s, b, groups, head_dim].
        mask: None for plain causal attention, else [b, 1, s, s], True where attention is forbidden.
        scale: of the scores; None for 1 / sqrt(head_dim).

    Returns:
        [s, b, heads * head_dim].
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else ~mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class _ProductsBackward(torch.autograd.Function):
    """Torch's forward pass, and backward by batched matrix products over groups of heads.

    On a CPU torch's own backward pass in bf16 takes several times the forward pass. With P = softmax(c Q K^T) and dP = dO V^T:
    dS = P (dP - rowsum(P dP)), dQ = c dS K, dK = c dS^T Q, dV = P^T dO. P is computed again, and not kept.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return scaled_dot_product(query, key, value, None, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        (length, batch, heads, width), groups = query.shape, key.shape[2]
        repeats = heads // groups
        output = gradients[0].view(query.shape)
        to_query, to_key, to_value = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        future = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
        future = future.repeat(repeats, 1)
        samples = max(1, _PIECE // (heads * length * length))

        def by_group(x: Tensor, first: int) -> Tensor:
            """[s, b, heads or groups, width] -> [samples * groups, repeats or 1 * s, width]."""
            piece = x[:, first : first + samples].unflatten(2, (groups, -1))
            return piece.permute(1, 2, 3, 0, 4).reshape(-1, length * piece.shape[3], width)

        def put(target: Tensor, first: int, values: Tensor) -> None:
            """The inverse of `by_group`."""
            piece = target[:, first : first + samples].unflatten(2, (groups, -1))
            piece.copy_(values.view(-1, groups, piece.shape[3], length, width).permute(3, 0, 1, 2, 4))

        for first in range(0, batch, samples):
            q, k, v, o = (by_group(x, first) for x in (query, key, value, output))
            chosen = torch.baddbmm(future, q, k.transpose(1, 2), alpha=ctx.scale).softmax(-1)
            put(to_value, first, chosen.transpose(1, 2) @ o)
            to_scores = torch._softmax_backward_data(o @ v.transpose(1, 2), chosen, -1, chosen.dtype)
            put(to_query, first, (to_scores @ k).mul_(ctx.scale))
            put(to_key, first, (to_scores.transpose(1, 2) @ q).mul_(ctx.scale))
        return to_query, to_key, to_value, None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Plain causal attention; shapes as of `scaled_dot_product`, by what is fastest for them."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[0] <= LONGEST:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return _ProductsBackward.apply(query, key, value, factor)  # type: ignore[no-any-return, no-untyped-call]
    return scaled_dot_product(query, key, value, None, scale)
