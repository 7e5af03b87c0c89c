"""The map: every logical matrix of a model, and where its parts live in this rank's fused and sharded tensors.

Initialization, checkpoints, export and analysis all ask it. Logical names follow the Hugging Face Llama
convention with global layer numbers, such as `model.layers.7.self_attn.q_proj.weight`, whatever the layout.

A logical matrix is split over tensor-parallel ranks along one axis in contiguous equal parts. Megatron-core fuses:

- `linear_qkv.weight`: per query group, rows [q x g | gate x g | k | v] x head_dim, with g query heads per group
  and no gate rows without an elementwise gate; a rank holds whole groups.
- `linear_fc1.weight`: on each rank, [gate shard ; up shard].

This module needs no Megatron: it deals in names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megagamma.config.schema import ModelConfig, padded_vocab_size

if TYPE_CHECKING:  # plans and submissions need the shapes only, and torch takes a second to import
    import torch
    from torch import Tensor

Rows = tuple[int, int]

# What a run keeps of every parameter: the fp32 master weight and Adam's two moments; names as torch.optim.AdamW has them.
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class LogicalParameter:
    """A matrix or gain of the model as a whole."""

    name: str
    role: str
    shape: tuple[int, ...]
    split_axis: int | None
    """Axis split over tensor-parallel ranks; None: replicated."""

    @cached_property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Part:
    """A rectangle of a logical parameter inside one tensor of this rank."""

    logical: LogicalParameter
    start: tuple[int, ...]
    """Its first element in the logical parameter."""
    rows: Rows
    """First and past-last row of the local tensor that it occupies."""
    columns: tuple[int, ...]
    """Sizes of the local tensor's other axes, all of which it fills."""

    def view(self, tensor: Tensor) -> Tensor:
        """The part in a tensor of the local (fused) shape: a weight, its gradient, or a moment of it."""
        return tensor[self.rows[0] : self.rows[1]]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows[1] - self.rows[0], *self.columns)


def _layer(name: str, role: str, shape: tuple[int, ...], split: int | None, layer: int) -> LogicalParameter:
    return LogicalParameter(f"model.layers.{layer}.{name}.weight", role, shape, split)


def layer_parameters(model: ModelConfig, layer: int) -> dict[str, LogicalParameter]:
    """Logical parameters of one layer by short name (`q`, `k`, `v`, `gate`, `o`, `mlp_gate`, ...)."""
    d, head_dim, ffn = model.hidden_size, model.head_dim, model.ffn_hidden_size
    heads, groups = model.num_attention_heads, model.num_query_groups
    assert head_dim is not None and ffn is not None and groups is not None
    found = {
        "input_norm": _layer("input_layernorm", "norm", (d,), None, layer),
        "q": _layer("self_attn.q_proj", "query", (heads * head_dim, d), 0, layer),
        "k": _layer("self_attn.k_proj", "key", (groups * head_dim, d), 0, layer),
        "v": _layer("self_attn.v_proj", "value", (groups * head_dim, d), 0, layer),
    }
    if model.attention_gate != "none":
        width = heads * head_dim if model.attention_gate == "elementwise" else heads
        found["gate"] = _layer("self_attn.gate_proj", "gate", (width, d), 0, layer)
    if model.qk_norm:
        found["q_norm"] = _layer("self_attn.q_norm", "norm", (head_dim,), None, layer)
        found["k_norm"] = _layer("self_attn.k_norm", "norm", (head_dim,), None, layer)
    found |= {
        "o": _layer("self_attn.o_proj", "attention_output", (d, heads * head_dim), 1, layer),
        "post_norm": _layer("post_attention_layernorm", "norm", (d,), None, layer),
        "mlp_gate": _layer("mlp.gate_proj", "mlp_gate", (ffn, d), 0, layer),
        "mlp_up": _layer("mlp.up_proj", "mlp_up", (ffn, d), 0, layer),
        "mlp_down": _layer("mlp.down_proj", "mlp_down", (d, ffn), 1, layer),
    }
    return found


def outer_parameters(model: ModelConfig) -> dict[str, LogicalParameter]:
    """Logical parameters outside the layers: embedding, final norm and, untied, the head."""
    d, vocabulary = model.hidden_size, padded_vocab_size(model)
    found = {
        "embedding": LogicalParameter("model.embed_tokens.weight", "embedding", (vocabulary, d), 0),
        "final_norm": LogicalParameter("model.norm.weight", "norm", (d,), None),
    }
    if not model.tie_embeddings:
        found["head"] = LogicalParameter("lm_head.weight", "head", (vocabulary, d), 0)
    return found


def logical_parameters(model: ModelConfig) -> list[LogicalParameter]:
    """Every logical parameter of the model, in order, without building it."""
    outer = outer_parameters(model)
    found = [outer["embedding"]]
    for layer in range(model.num_layers):
        found += layer_parameters(model, layer).values()
    found.append(outer["final_norm"])
    if "head" in outer:
        found.append(outer["head"])
    return found


def _parts_of_split(logical: LogicalParameter, rank: int, size: int, first_row: int = 0) -> Part:
    """The part of a plainly split (or replicated) parameter, at `first_row` of the local tensor."""
    start, shape = [0] * len(logical.shape), list(logical.shape)
    if logical.split_axis is not None:
        shape[logical.split_axis] //= size
        start[logical.split_axis] = rank * shape[logical.split_axis]
    return Part(logical, tuple(start), (first_row, first_row + shape[0]), tuple(shape[1:]))


def _qkv_parts(model: ModelConfig, layer: dict[str, LogicalParameter], rank: int, size: int) -> list[Part]:
    head_dim, groups = model.head_dim, model.num_query_groups
    assert head_dim is not None and groups is not None
    per_group = model.num_attention_heads // groups
    blocks = [("q", per_group * head_dim)]
    if model.attention_gate == "elementwise":
        blocks.append(("gate", per_group * head_dim))
    blocks += [("k", head_dim), ("v", head_dim)]
    parts, row = [], 0
    for group in range(rank * (groups // size), (rank + 1) * (groups // size)):
        for short, height in blocks:
            logical = layer[short]
            parts.append(Part(logical, (group * height, 0), (row, row + height), (logical.shape[1],)))
            row += height
    return parts


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

# Tensors of a Megatron layer that hold exactly one logical parameter. The names with `layer_norm_weight` are those
# of Transformer Engine's fused norm-and-linear modules.
_SINGLE = {
    "input_layernorm.weight": "input_norm",
    "self_attention.linear_qkv.layer_norm_weight": "input_norm",
    "self_attention.linear_gate.weight": "gate",
    "self_attention.q_layernorm.weight": "q_norm",
    "self_attention.k_layernorm.weight": "k_norm",
    "self_attention.linear_proj.weight": "o",
    "pre_mlp_layernorm.weight": "post_norm",
    "mlp.linear_fc1.layer_norm_weight": "post_norm",
    "mlp.linear_fc2.weight": "mlp_down",
}


def parts_of(megatron_name: str, model: ModelConfig, first_layer: int, rank: int, size: int) -> list[Part]:
    """Parts of logical parameters inside one tensor of a Megatron GPTModel.

    Args:
        megatron_name: name in `GPTModel.named_parameters()`, with layers numbered from 0 on this stage.
        model: the model's config, vocabulary known.
        first_layer: global number of this stage's first layer.
        rank: tensor-parallel rank.
        size: tensor-parallel size.

    Raises:
        KeyError: a tensor that the map does not know; nothing may be left out.
    """
    inner = _LAYER.fullmatch(megatron_name)
    if inner is None:
        outer = outer_parameters(model)
        short = {
            "embedding.word_embeddings.weight": "embedding",
            "decoder.final_layernorm.weight": "final_norm",
            "output_layer.weight": "embedding" if model.tie_embeddings else "head",
        }[megatron_name]
        return [_parts_of_split(outer[short], rank, size)]
    layer = layer_parameters(model, first_layer + int(inner.group(1)))
    name = inner.group(2)
    if name == "self_attention.linear_qkv.weight":
        return _qkv_parts(model, layer, rank, size)
    if name == "mlp.linear_fc1.weight":
        gate = _parts_of_split(layer["mlp_gate"], rank, size)
        return [gate, _parts_of_split(layer["mlp_up"], rank, size, first_row=gate.rows[1])]
    return [_parts_of_split(layer[_SINGLE[name]], rank, size)]


@dataclass(frozen=True)
class MappedTensor:
    """One tensor of this rank with its parts."""

    name: str
    parameter: torch.nn.Parameter
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def role(self) -> str:
        """Role of the tensor; a fused one has its first part's (all parts of one tensor are matrices, or all norms)."""
        return self.parts[0].logical.role

    @property
    def is_partitioned(self) -> bool:
        """Whether ZeRO 3 has left an empty stub of the weight here, its shard beside it."""
        return hasattr(self.parameter, "ds_tensor")

    @property
    def is_copy(self) -> bool:
        """Whether it is the last stage's copy of a tied embedding, whose original is on the first stage."""
        return self.name == "output_layer.weight" and self.role == "embedding"

    @property
    def is_split(self) -> bool:
        """Whether tensor-parallel ranks hold different parts of it."""
        return self.parts[0].logical.split_axis is not None


class ParameterMap:
    """The map of one rank's model: its tensors, each with the logical parts that it holds."""

    def __init__(self, chunks: list[torch.nn.Module], model: ModelConfig, rank: int, size: int) -> None:
        """Args: chunks: this rank's GPTModel, or one per virtual stage; rank, size: tensor-parallel."""
        self.model = model
        self.tensors: list[MappedTensor] = []
        for chunk in chunks:
            layers: Any = chunk.decoder.layers  # type: ignore[union-attr]
            first_layer = layers[0].layer_number - 1 if len(layers) else 0
            for name, parameter in chunk.named_parameters():
                parts = parts_of(name, model, first_layer, rank, size)
                # Under ZeRO 3 the parameter itself is an empty stub, its true shape beside it.
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                rows = sum(part.rows[1] - part.rows[0] for part in parts)
                if shape != (rows, *parts[0].columns):
                    raise ValueError(f"{name}: the map expects {(rows, *parts[0].columns)}, the model has {shape}")
                self.tensors.append(MappedTensor(name, parameter, shape, tuple(parts)))

    def __iter__(self) -> Iterator[MappedTensor]:
        return iter(self.tensors)

    def mark_tensor_parallel(self) -> None:
        """Set the attributes by which Megatron and DeepSpeed tell split parameters from replicated ones.

        Megatron sets them in its own initialization, which is switched off.
        """
        for tensor in self.tensors:
            axis = tensor.parts[0].logical.split_axis
            tensor.parameter.tensor_model_parallel = axis is not None  # type: ignore[attr-defined]
            tensor.parameter.partition_dim = -1 if axis is None else axis  # type: ignore[attr-defined]
            tensor.parameter.partition_stride = 1  # type: ignore[attr-defined]
