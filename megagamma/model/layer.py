"""A transformer layer as one function of its input and its weights, where nothing needs the modules inside.

Megatron's layer calls some fifteen modules, which hide from a compiler what lies between the matrix products, and cost a
small model more than its products do. On one tensor-parallel rank the same operations are written out here, one after the
other: torch runs them as they stand, or compiles the layer whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import linear

from megagamma.config.schema import Config
from megagamma.model.attention import gated, split
from megagamma.model.attention_core import causal_attention
from megagamma.model.norm import NORM, NORM_AND_ROTATE
from megagamma.model.regions import Region
from megagamma.model.rotary import ROTATION
from megagamma.model.swiglu import SWIGLU

Gate = Literal["none", "elementwise", "headwise"]


@dataclass(frozen=True)
class LayerShape:
    """What a layer's function depends on besides its tensors."""

    query_groups: int
    heads_per_group: int
    head_dim: int
    gate: Gate
    epsilon: float
    softmax_scale: float | None


@dataclass(frozen=True)
class _Forms:
    """Functions between the products: torch's own kernels, or formulas for the compiler."""

    norm: Callable[..., Tensor]
    rotate: Callable[..., Tensor]
    norm_and_rotate: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    split: Callable[..., tuple[Tensor, ...]]


_EAGER = _Forms(NORM.eager, ROTATION.eager, NORM_AND_ROTATE.eager, SWIGLU.eager, split)
_FORMULAS = _Forms(
    NORM.formula, ROTATION.formula, NORM_AND_ROTATE.formula, SWIGLU.formula, lambda x, sizes: x.split(sizes, dim=-1)
)


def _attended(
    forms: _Forms,
    shape: LayerShape,
    normed: Tensor,
    table: Tensor,
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    head_gate: Tensor | None,
) -> Tensor:
    """[s, b, hidden] -> [s, b, heads * head_dim], gated."""
    length, batch, _ = normed.shape
    wide = shape.heads_per_group * shape.head_dim
    sizes = [wide, *([wide] if shape.gate == "elementwise" else []), shape.head_dim, shape.head_dim]
    query, *gate, key, value = forms.split(
        linear(normed, qkv).view(length, batch, shape.query_groups, sum(sizes)), sizes
    )
    query = query.reshape(length, batch, -1, shape.head_dim)
    if query_norm is None:
        query, key = forms.rotate(query, table), forms.rotate(key, table)
    else:
        query = forms.norm_and_rotate(query, query_norm, shape.epsilon, table)
        key = forms.norm_and_rotate(key, key_norm, shape.epsilon, table)
    attended = causal_attention(query, key, value, shape.softmax_scale)
    if gate:
        return gated(attended, gate[0].reshape(attended.shape))
    return attended if head_gate is None else gated(attended, linear(normed, head_gate))


def _layer(
    forms: _Forms,
    shape: LayerShape,
    x: Tensor,
    table: Tensor,
    input_norm: Tensor,
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    head_gate: Tensor | None,
    output: Tensor,
    mlp_norm: Tensor,
    gate_and_up: Tensor,
    down: Tensor,
) -> Tensor:
    """x: [s, b, hidden]; table: see `megagamma.model.rotary.rotate`; weights as Megatron fuses them; returns as x."""
    normed = forms.norm(x, input_norm, shape.epsilon)
    x = x + linear(_attended(forms, shape, normed, table, qkv, query_norm, key_norm, head_gate), output)
    del normed  # what the backward pass does not need is free when the MLP begins
    return x + linear(forms.swiglu(linear(forms.norm(x, mlp_norm, shape.epsilon), gate_and_up)), down)


@functools.cache
def layer_region(shape: LayerShape) -> Region:
    """The function of all layers of a shape: arguments as of `_layer`, from x on."""
    return Region(functools.partial(_layer, _EAGER, shape), functools.partial(_layer, _FORMULAS, shape))


def calls_whole_layers(config: Config, zero_stage: int) -> bool:
    """Whether the layers of a run are `WholeLayer`s that call their function."""
    model = config.model
    plain = not (model.transformer_engine or config.data.reset_attention)
    return plain and config.parallel.tensor == 1 and model.recompute != "selective" and zero_stage < 3


class WholeLayer(TransformerLayer):
    """Megatron's layer of this project's modules, as one function where that is possible.

    It is where there is one tensor-parallel rank, no mask of documents, nothing of the layer computed again in the backward
    pass, no weight that ZeRO 3 gathers as its module is called, and no hook on a module inside. Elsewhere the modules are
    called, as Megatron does.
    """

    @functools.cached_property
    def _inner(self) -> list[torch.nn.Module]:
        return [module for module in self.modules() if module is not self]

    def _is_hooked(self) -> bool:
        return any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            for module in self._inner
        )

    @functools.cached_property
    def _arguments(self) -> tuple[Region, list[Tensor | None]] | None:
        """The function and its weights; None: the modules are needed."""
        weights = list(self.parameters())
        partitioned = any(hasattr(weight, "ds_id") for weight in weights)
        if self.pg_collection.tp.size() > 1 or self.config.recompute_granularity == "selective" or partitioned:
            return None
        attention: Any = self.self_attention
        head_gate = getattr(attention, "linear_gate", None)
        gate: Gate = "none"
        if head_gate is not None:
            gate = "headwise"
        elif self.config.attention_output_gate:
            gate = "elementwise"
        shape = LayerShape(
            attention.num_query_groups_per_partition,
            attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition,
            attention.hidden_size_per_attention_head,
            gate,
            self.input_layernorm.eps,
            attention.core_attention.softmax_scale,
        )
        modules = (
            self.input_layernorm, attention.linear_qkv, attention.q_layernorm, attention.k_layernorm, head_gate,
            attention.linear_proj, self.pre_mlp_layernorm, self.mlp.linear_fc1, self.mlp.linear_fc2,
        )  # fmt: skip
        return layer_region(shape), [getattr(module, "weight", None) for module in modules]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """hidden_states [s, b, hidden] -> the same, and None; rotary_pos_emb: see `megagamma.model.rotary.rotate`."""
        if attention_mask is not None or self._arguments is None or self._is_hooked():
            arguments = {"attention_mask": attention_mask, "rotary_pos_emb": rotary_pos_emb, **kwargs}
            return super().forward(hidden_states, **arguments)  # type: ignore[no-any-return]
        region, weights = self._arguments
        return region(hidden_states, rotary_pos_emb, *weights), None
