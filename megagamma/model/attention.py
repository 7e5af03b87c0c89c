"""Attention modules placed in Megatron's layer spec: the SDPA core, and the output gate."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megagamma.model.attention_core import causal_attention, scaled_dot_product
from megagamma.model.norm import RMSNorm
from megagamma.model.regions import Region
from megagamma.model.rotary import rotate


class SDPACoreAttention(torch.nn.Module):
    """Causal attention without projections, see `megagamma.model.attention_core`.

    It takes and returns Megatron's shapes: q [s, b, heads, head_dim], k and v [s, b, groups, head_dim] ->
    [s, b, heads * head_dim], heads and groups those of this rank.
    """

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """attention_mask: None for plain causal attention, else [b, 1, s, s], True where attention is forbidden."""
        if attention_mask is None:
            return causal_attention(query, key, value, self.softmax_scale)
        return scaled_dot_product(query, key, value, attention_mask, self.softmax_scale)


class _Split(torch.autograd.Function):
    """torch.split along the last axis, whose gradient is written in place instead of concatenated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.shape = sizes, x.shape
        return x.split(sizes, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].new_empty(ctx.shape)
        for part, gradient in zip(whole.split(ctx.sizes, dim=-1), gradients, strict=True):
            part.copy_(gradient)
        return whole, None


def split(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """torch.split along the last axis, with a gradient that is not concatenated."""
    return _Split.apply(x, sizes)  # type: ignore[no-any-return, no-untyped-call]


class RotaryAttention(SelfAttention):
    """Megatron's self-attention that rotates queries and keys by the table of `RotaryTable`.

    The table arrives as Megatron's `rotary_pos_emb`. It is kept back from the parent, which would rotate in a way of its
    own, and used within the same call.
    """

    _table: Tensor

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, hidden]; rotary_pos_emb: see `rotate`."""
        self._table = rotary_pos_emb
        return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]

    def get_query_key_value_tensors(  # type: ignore[override]
        self, hidden_states: Tensor, key_value_states: Any = None, output_gate: bool = False, **_: Any
    ) -> tuple[Tensor, ...]:
        """hidden_states [s, b, hidden] -> query [s, b, heads, head_dim], key and value [s, b, groups, head_dim], and
        the gate's logits, as the query, when `output_gate`; heads and groups of this rank. The parent's fused layout:
        per group [q | gate | k | v]."""
        fused, _bias = self.linear_qkv(hidden_states)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        wide = self.num_attention_heads_per_partition // groups * width
        sizes = [wide, wide, width, width] if output_gate else [wide, width, width]
        query, *gate, key, value = split(fused.view(*fused.shape[:2], groups, sum(sizes)), sizes)
        query = query.reshape(*query.shape[:2], -1, width)
        if isinstance(self.q_layernorm, RMSNorm):
            return self.q_layernorm(query, self._table), self.k_layernorm(key, self._table), value, *gate
        if self.q_layernorm is not None:  # Transformer Engine's
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return rotate(query, self._table), rotate(key, self._table), value, *gate


def gated(x: Tensor, gate: Tensor) -> Tensor:
    heads = x.view(*gate.shape, -1)
    return (heads * torch.sigmoid(gate.float()).to(x.dtype).unsqueeze(-1)).view(x.shape)


_gate = Region(gated, gated)


class ElementwiseGatedAttention(RotaryAttention):
    """Megatron's gated self-attention: y * sigmoid(x W), one gate per feature, fused into `linear_qkv`.

    The parent's gate goes through a compiler, which a plain CPU may not have.
    """

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return _gate(x, gate.reshape(x.shape))  # type: ignore[no-any-return]


class HeadwiseGatedAttention(RotaryAttention):
    """Self-attention whose output is scaled per head by sigmoid(x w_head), with a gate projection of its own.

    Megatron-core knows only the elementwise gate. The parent is built without it, so that `linear_qkv` keeps its
    ungated layout, and the gate comes from `linear_gate`, hidden_size -> heads.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        ungated = copy.copy(config)
        ungated.attention_output_gate = False
        super().__init__(ungated, *args, **kwargs)
        self.config = config
        self.linear_gate = ColumnParallelLinear(
            config.hidden_size,
            config.num_attention_heads,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            tp_group=self.pg_collection.tp,
        )

    def get_query_key_value_tensors(  # type: ignore[override]
        self, hidden_states: Tensor, key_value_states: Any = None, output_gate: bool = False, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        query, key, value = super().get_query_key_value_tensors(hidden_states)
        gate, _ = self.linear_gate(hidden_states)
        return query, key, value, gate

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return _gate(x, gate)  # type: ignore[no-any-return]
