"""The tensors of Megatron-core's GPTModel on this rank, whoever built it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from megagamma.adapters.blocks import Block, Box, Constant, Entry, LogicalParameter, Plan
from megagamma.adapters.rules import MLP, PROJECTIONS
from megagamma.errors import InitializationError

_EXPERT = {short: (f"mlp.experts.{{expert}}.{short}_proj", f"expert_{short}") for short in MLP}
_SHARED = {short: (f"mlp.shared_expert.{short}_proj", f"shared_{short}") for short in MLP}


@dataclass(frozen=True)
class _Shard:
    """This rank among those that split a tensor."""

    rank: int
    size: int


_WHOLE = _Shard(0, 1)


@dataclass(frozen=True)
class _Names:
    """The logical names of a layer's matrices."""

    layer: int

    def parameter(self, name: str, role: str, shape: tuple[int, int]) -> LogicalParameter:
        return LogicalParameter(f"model.layers.{self.layer}.{name}.weight", role, shape, None)


def _rows(logical: Callable[[tuple[int, int]], LogicalParameter], shape: tuple[int, ...], shard: _Shard) -> Entry:
    """A matrix whose outputs are split."""
    rows, inputs = shape
    return (Block(logical((rows * shard.size, inputs)), (shard.rank * rows, 0), ((0, rows), (0, inputs))),)


def _columns(logical: Callable[[tuple[int, int]], LogicalParameter], shape: tuple[int, ...], shard: _Shard) -> Entry:
    """A matrix whose inputs are split."""
    rows, inputs = shape
    return (Block(logical((rows, inputs * shard.size)), (0, shard.rank * inputs), ((0, rows), (0, inputs))),)


def _qkv(names: _Names, config: Any, shape: tuple[int, ...], shard: _Shard) -> Entry:
    """Per query group [query of its heads | gate of its heads | key | value]; a rank has whole groups."""
    groups = config.num_query_groups or config.num_attention_heads
    heads, width, inputs = config.num_attention_heads // groups, config.kv_channels, shape[1]
    parts = {"q": heads * width}
    if getattr(config, "attention_output_gate", False):
        parts["gate"] = heads * width
    parts |= {"k": width, "v": width}
    if groups % shard.size or sum(parts.values()) * groups // shard.size != shape[0]:
        raise InitializationError(
            f"linear_qkv: {shape[0]} rows on one of {shard.size} tensor-parallel ranks are not {groups} groups of "
            f"{list(parts.values())} rows over the ranks: use a tensor-parallel size that divides num_query_groups"
        )
    blocks, first = [], 0
    for group in range(shard.rank * groups // shard.size, (shard.rank + 1) * groups // shard.size):
        for short, height in parts.items():
            name, role = ("self_attn.gate_proj", "gate") if short == "gate" else PROJECTIONS[short]
            box: Box = ((first, first + height), (0, inputs))
            blocks.append(Block(names.parameter(name, role, (height * groups, inputs)), (group * height, 0), box))
            first += height
    return tuple(blocks)


def _fc1(names: _Names, parts: dict[str, tuple[str, str]], gated: bool, shape: tuple[int, ...], shard: _Shard) -> Entry:
    """[gate shard; up shard], or the only matrix of an MLP without a gate, which is called up."""
    shorts = ("gate", "up") if gated else ("up",)
    height, inputs = shape[0] // len(shorts), shape[1]
    blocks = []
    for number, short in enumerate(shorts):
        box: Box = ((number * height, (number + 1) * height), (0, inputs))
        logical = names.parameter(*parts[short], (height * shard.size, inputs))
        blocks.append(Block(logical, (shard.rank * height, 0), box))
    return tuple(blocks)


class _Chunk:
    """One GPTModel of this rank."""

    def __init__(self, model: Any) -> None:
        from megatron.core import parallel_state

        self.model, self.config = model, model.config
        tensor = getattr(getattr(model, "pg_collection", None), "tp", None)
        if tensor is not None:
            self.tensor = _Shard(tensor.rank(), tensor.size())
        else:
            state = parallel_state
            self.tensor = _Shard(state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size())
        self.layers = {index: layer.layer_number - 1 for index, layer in enumerate(model.decoder.layers)}

    @functools.cached_property
    def experts(self) -> tuple[_Shard, _Shard]:
        """Among the ranks that hold other experts, and among those that split one."""
        from megatron.core import parallel_state as state

        return (
            _Shard(state.get_expert_model_parallel_rank(), state.get_expert_model_parallel_world_size()),
            _Shard(state.get_expert_tensor_parallel_rank(), state.get_expert_tensor_parallel_world_size()),
        )

    def entry(self, name: str, shape: tuple[int, ...]) -> Entry | None:
        """What one tensor holds; None where that is not known."""
        if name.endswith("bias"):
            return Constant(0.0, "bias")
        if re.search(r"norm\w*weight$|norm\.weight$", name):
            return Constant(0.0 if self.config.layernorm_zero_centered_gamma else 1.0, "norm")
        inner = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if inner is not None:
            return self._in_layer(_Names(self.layers[int(inner.group(1))]), inner.group(2), shape)
        tied = self.model.share_embeddings_and_output_weights
        found = {
            "embedding.word_embeddings.weight": ("model.embed_tokens.weight", "embedding", self.tensor),
            "embedding.position_embeddings.weight": ("model.embed_positions.weight", "position", _WHOLE),
            # The last stage's copy of a tied embedding.
            "output_layer.weight": ("model.embed_tokens.weight", "embedding", self.tensor)
            if tied
            else ("lm_head.weight", "head", self.tensor),
        }.get(name)
        if found is None:
            return None
        logical, role, shard = found
        return _rows(lambda size: LogicalParameter(logical, role, size, None), shape, shard)

    def _in_layer(self, names: _Names, name: str, shape: tuple[int, ...]) -> Entry | None:
        def of(one: tuple[str, str]) -> Callable[[tuple[int, int]], LogicalParameter]:
            return lambda size: names.parameter(*one, size)

        gated, config = self.config.gated_linear_unit, self.config
        if name == "self_attention.linear_qkv.weight":
            return _qkv(names, config, shape, self.tensor)
        if name == "self_attention.linear_gate.weight":  # this project's, one per head
            return _rows(of(("self_attn.gate_proj", "gate")), shape, self.tensor)
        if name == "self_attention.linear_proj.weight":
            return _columns(of(PROJECTIONS["o"]), shape, self.tensor)
        if name in ("mlp.router.weight", "mlp.shared_experts.gate_weight"):
            place = "mlp.gate" if "router" in name else "mlp.shared_expert_gate"
            return _rows(of((place, "router")), shape, _WHOLE)
        match = re.fullmatch(r"mlp\.(shared_experts\.)?linear_fc([12])\.weight", name)
        if match is not None:
            parts, shard = _SHARED if match.group(1) else MLP, self.tensor
        else:
            match = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc([12])\.weight", name) or re.fullmatch(
                r"mlp\.experts\.(?P<layer>linear_fc)(?P<which>[12])\.weight(?P<expert>\d+)", name
            )
            if match is None:
                return None
            among, shard = self.experts
            number = int(match.groupdict().get("expert") or match.group(1))
            expert = among.rank * (config.num_moe_experts // among.size) + number
            parts = {short: (place.format(expert=expert), role) for short, (place, role) in _EXPERT.items()}
        if match.group(2) == "1":
            return _fc1(names, parts, gated, shape, shard)
        return _columns(of(parts["down"]), shape, shard)


def check_given(models: list[nn.Module], given: Mapping[str, Entry]) -> None:
    """Refuse matrices by the user's roles where a rank holds a part of them, or its layers have other numbers than the model's.

    Raises:
        InitializationError: the ranks would draw the same numbers for different parts.
    """
    parallel: Any = models[0].config
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    matrices = [name for name, entry in given.items() if isinstance(entry, tuple)]
    if matrices and max(sizes) > 1:
        raise InitializationError(
            f"roles: {matrices[0]}: a matrix by name is drawn whole, and this model lies on {sizes[0]} tensor-parallel and "
            f"{sizes[1]} pipeline ranks: give it 'keep', and draw the model on one rank where that is no choice"
        )


def megatron_plan(models: list[nn.Module], given: Mapping[str, Entry] | None = None) -> Plan:
    """The plan of this rank's chunks; parameters that are not known are left out.

    Args:
        models: GPTModels of one rank, in the order of its virtual stages.
        given: entries by the user's roles, which are not asked for here.

    Raises:
        InitializationError: attention or a layout that is not known.
    """
    config: Any = models[0].config
    if getattr(config, "multi_latent_attention", False) and not given:
        raise InitializationError("multi_latent_attention=True: this attention has no table of roles: give roles=")
    entries: dict[str, Entry] = {}
    for number, model in enumerate(models):
        prefix, chunk = f"{number}." if len(models) > 1 else "", _Chunk(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            entry = chunk.entry(name, tuple(parameter.shape))
            if entry is not None:
                entries[prefix + name] = entry
    return Plan(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        entries=entries,
        epsilon=config.layernorm_epsilon,
        qk_norm=bool(config.qk_layernorm),
    )
