"""The map: every logical element lies on exactly one tensor-parallel rank, where Megatron's layout puts it."""

import itertools
import re

import pytest
import torch

from megagamma.config.schema import ROLES, ModelConfig, resolve_model
from megagamma.initialization.gamma import d_in
from megagamma.model.parameters import (
    MappedTensor,
    ParameterMap,
    Part,
    layer_parameters,
    logical_parameters,
    outer_parameters,
    parts_of,
)

GATES = ("none", "elementwise", "headwise")
HIDDEN, LAYERS, HEADS, GROUPS, HEAD_DIM, FFN, VOCABULARY = 24, 3, 8, 4, 6, 40, 50
PADDED = 64  # 50 rounded up to a multiple of 32


def build(gate="elementwise", qk_norm=True, tied=False, groups=GROUPS):
    return resolve_model(
        ModelConfig(
            hidden_size=HIDDEN, num_layers=LAYERS, num_attention_heads=HEADS, num_query_groups=groups,
            head_dim=HEAD_DIM, ffn_hidden_size=FFN, vocab_size=VOCABULARY, vocab_size_multiple=32,
            tie_embeddings=tied, attention_gate=gate, qk_norm=qk_norm,
        )
    )  # fmt: skip


def numbered(model):
    """Logical tensors whose elements are all different numbers."""
    found, first = {}, 0
    for logical in logical_parameters(model):
        found[logical.name] = torch.arange(first, first + logical.numel).view(logical.shape)
        first += logical.numel
    return found, first


def megatron_tensors(model, weights, rank, size, first_layer=0, last_layer=LAYERS):
    """One rank's tensors, built from Megatron-core's own description of its layout, without the map.

    Its attention reshapes the output of linear_qkv to [groups, (queries per group + gates per group + 2) * head_dim],
    and its SwiGLU cuts the output of linear_fc1, [gate | up], in two on every rank.
    """
    found = {}
    per_group = HEADS // model.num_query_groups
    for layer in range(first_layer, last_layer):
        full, here = f"model.layers.{layer}.", f"decoder.layers.{layer - first_layer}."

        def weight(name, full=full):
            return weights[f"{full}{name}.weight"]

        def by_group(name, heads_per_group, weight=weight):
            return weight(f"self_attn.{name}").view(model.num_query_groups, heads_per_group * HEAD_DIM, HIDDEN)

        pieces = [by_group("q_proj", per_group)]
        if model.attention_gate == "elementwise":
            pieces.append(by_group("gate_proj", per_group))
        pieces += [by_group("k_proj", 1), by_group("v_proj", 1)]
        fused = torch.cat(pieces, dim=1).chunk(size)[rank].reshape(-1, HIDDEN)
        found[here + "self_attention.linear_qkv.weight"] = fused
        if model.attention_gate == "headwise":
            found[here + "self_attention.linear_gate.weight"] = weight("self_attn.gate_proj").chunk(size)[rank]
        if model.qk_norm:
            found[here + "self_attention.q_layernorm.weight"] = weight("self_attn.q_norm")
            found[here + "self_attention.k_layernorm.weight"] = weight("self_attn.k_norm")
        found[here + "self_attention.linear_proj.weight"] = weight("self_attn.o_proj").chunk(size, dim=1)[rank]
        found[here + "input_layernorm.weight"] = weight("input_layernorm")
        found[here + "pre_mlp_layernorm.weight"] = weight("post_attention_layernorm")
        gate, up = (weight(f"mlp.{name}_proj").chunk(size)[rank] for name in ("gate", "up"))
        found[here + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        found[here + "mlp.linear_fc2.weight"] = weight("mlp.down_proj").chunk(size, dim=1)[rank]
    found["embedding.word_embeddings.weight"] = weights["model.embed_tokens.weight"].chunk(size)[rank]
    found["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
    if not model.tie_embeddings:
        found["output_layer.weight"] = weights["lm_head.weight"].chunk(size)[rank]
    return found


def box(part):
    return tuple(slice(a, a + n) for a, n in zip(part.start, part.shape, strict=True))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_parts_of_all_ranks_reassemble_the_logical_matrices(gate, qk_norm, tied, size):
    model = build(gate, qk_norm, tied)
    weights, _ = numbered(model)
    copies = {name: torch.zeros(weight.shape, dtype=torch.int64) for name, weight in weights.items()}
    rebuilt = {name: torch.full_like(weight, -1) for name, weight in weights.items()}
    for rank in range(size):
        for name, tensor in megatron_tensors(model, weights, rank, size).items():
            rows = torch.zeros(tensor.shape[0], dtype=torch.int64)
            for part in parts_of(name, model, 0, rank, size):
                assert part.columns == tensor.shape[1:]
                rows[part.rows[0] : part.rows[1]] += 1
                rebuilt[part.logical.name][box(part)] = part.view(tensor)
                copies[part.logical.name][box(part)] += 1
            assert (rows == 1).all(), f"{name}: the parts must cover the local tensor exactly once"
    for logical in logical_parameters(model):
        assert torch.equal(rebuilt[logical.name], weights[logical.name]), logical.name
        # Split parameters lie on exactly one rank, replicated ones on each.
        assert (copies[logical.name] == (size if logical.split_axis is None else 1)).all(), logical.name


@pytest.mark.parametrize("groups", [2, 8])
def test_other_numbers_of_groups(groups):
    """8 groups: plain multi-head attention; 2: four query heads share a key head."""
    model = build(groups=groups)
    weights, _ = numbered(model)
    for rank in range(2):
        tensors = megatron_tensors(model, weights, rank, 2)
        for name, tensor in tensors.items():
            for part in parts_of(name, model, 0, rank, 2):
                assert torch.equal(part.view(tensor), weights[part.logical.name][box(part)])


def test_pipeline_stages_have_global_layer_numbers():
    model = build()
    weights, _ = numbered(model)
    for name, tensor in megatron_tensors(model, weights, 1, 2, first_layer=2).items():
        for part in parts_of(name, model, 2 if ".layers." in name else 0, 1, 2):
            assert torch.equal(part.view(tensor), weights[part.logical.name][box(part)])
            if ".layers." in name:
                assert part.logical.name.startswith("model.layers.2.")


def test_the_order_of_gate_and_up_matters():
    """Negative control: swapped halves of fc1 must not pass for the right ones."""
    model = build()
    weights, _ = numbered(model)
    fused = megatron_tensors(model, weights, 0, 2)["decoder.layers.0.mlp.linear_fc1.weight"]
    swapped = torch.cat(fused.chunk(2)[::-1])
    gate, up = parts_of("decoder.layers.0.mlp.linear_fc1.weight", model, 0, 0, 2)
    assert (gate.logical.role, up.logical.role) == ("mlp_gate", "mlp_up")
    assert not torch.equal(gate.view(swapped), weights[gate.logical.name][box(gate)])


@pytest.mark.parametrize(("gate", "qk_norm", "tied"), itertools.product(GATES, [False, True], [False, True]))
def test_names_shapes_and_roles(gate, qk_norm, tied):
    model = build(gate, qk_norm, tied)
    found = logical_parameters(model)
    assert len({logical.name for logical in found}) == len(found)
    attention = r"self_attn\.(q_proj|k_proj|v_proj|o_proj|gate_proj|q_norm|k_norm)"
    layer = rf"model\.layers\.\d+\.({attention}|mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm)"
    llama = re.compile(rf"({layer}|model\.embed_tokens|model\.norm|lm_head)\.weight")
    assert all(llama.fullmatch(logical.name) for logical in found)
    assert {logical.role for logical in found} == {
        *(set(ROLES) - ({"gate"} if gate == "none" else set()) - ({"head"} if tied else set())),
        "norm",
    }
    shapes = {logical.name: logical.shape for logical in found}
    wide, narrow = HEADS * HEAD_DIM, GROUPS * HEAD_DIM
    prefix = f"model.layers.{LAYERS - 1}."
    assert shapes["model.embed_tokens.weight"] == (PADDED, HIDDEN)
    assert shapes.get("lm_head.weight") == (None if tied else (PADDED, HIDDEN))
    assert shapes[prefix + "self_attn.q_proj.weight"] == (wide, HIDDEN)
    assert shapes[prefix + "self_attn.k_proj.weight"] == (narrow, HIDDEN)
    assert shapes[prefix + "self_attn.v_proj.weight"] == (narrow, HIDDEN)
    assert shapes[prefix + "self_attn.o_proj.weight"] == (HIDDEN, wide)
    gates = {"none": None, "elementwise": (wide, HIDDEN), "headwise": (HEADS, HIDDEN)}
    assert shapes.get(prefix + "self_attn.gate_proj.weight") == gates[gate]
    assert shapes.get(prefix + "self_attn.q_norm.weight") == ((HEAD_DIM,) if qk_norm else None)
    assert shapes[prefix + "mlp.down_proj.weight"] == (HIDDEN, FFN)
    assert not any(name.startswith(f"model.layers.{LAYERS}.") for name in shapes)


def test_names_are_those_of_a_stock_model():
    """Without a gate the names and shapes are a Hugging Face Qwen3's, but for the padded vocabulary."""
    transformers = pytest.importorskip("transformers")
    model = build(gate="none")
    config = transformers.Qwen3Config(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM, intermediate_size=FFN, vocab_size=PADDED, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        stock = transformers.Qwen3ForCausalLM(config)
    ours = {logical.name: logical.shape for logical in logical_parameters(model)}
    assert ours == {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}


def test_d_in_follows_the_flag():
    layer = layer_parameters(build(), 0)
    assert d_in(layer["o"].role, layer["o"].shape, HIDDEN, "d_in") == HEADS * HEAD_DIM
    assert d_in(layer["o"].role, layer["o"].shape, HIDDEN, "hidden") == HIDDEN
    embedding = outer_parameters(build())["embedding"]
    assert d_in(embedding.role, embedding.shape, HIDDEN, "d_in") == HIDDEN


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.experts.weight", "decoder.layers.0.mlp.linear_fc1.bias", "position.weight", ""]
)
def test_unknown_tensors_are_refused(name):
    with pytest.raises(KeyError):
        parts_of(name, build(), 0, 0, 1)


@pytest.mark.parametrize(
    ("gate", "qk_norm", "name"),
    [
        ("elementwise", True, "self_attention.linear_gate.weight_extra"),
        ("none", True, "self_attention.linear_gate.weight"),
        ("none", False, "self_attention.q_layernorm.weight"),
    ],
)
def test_tensors_that_the_config_does_not_have_are_refused(gate, qk_norm, name):
    with pytest.raises(KeyError):
        parts_of(f"decoder.layers.0.{name}", build(gate, qk_norm), 0, 0, 1)


def test_tied_output_layer_is_the_embedding():
    (part,) = parts_of("output_layer.weight", build(tied=True), 0, 1, 2)
    assert part == Part(outer_parameters(build(tied=True))["embedding"], (32, 0), (0, 32), (HIDDEN,))


def test_transformer_engine_names_hold_the_same_norms():
    for fused, plain in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ):
        assert parts_of(f"decoder.layers.1.{fused}", build(), 0, 0, 1) == parts_of(
            f"decoder.layers.1.{plain}", build(), 0, 0, 1
        )


# The map of a module


class Chunk(torch.nn.Module):
    """Modules nested so that the parameters get Megatron's names."""

    def __init__(self, tensors, first_layer):
        super().__init__()
        for name, tensor in tensors.items():
            module = self
            *path, leaf = name.split(".")
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, torch.nn.ModuleList() if step == "layers" else torch.nn.Module())
                module = getattr(module, step)
            module.register_parameter(leaf, torch.nn.Parameter(tensor.float()))
        for offset, layer in enumerate(self.decoder.layers.children()):
            layer.layer_number = first_layer + offset + 1


def chunk(model, rank=0, size=1, first_layer=0):
    return Chunk(megatron_tensors(model, numbered(model)[0], rank, size, first_layer), first_layer)


def test_map_of_a_module_knows_all_its_tensors():
    model = build()
    found = ParameterMap([chunk(model, 1, 2, first_layer=1)], model, 1, 2)
    names = {part.logical.name for tensor in found for part in tensor.parts}
    absent = {logical.name for logical in layer_parameters(model, 0).values()}
    assert names == {logical.name for logical in logical_parameters(model)} - absent
    fused = next(tensor for tensor in found if tensor.name.endswith("0.self_attention.linear_qkv.weight"))
    assert fused.role == "query"
    assert {part.logical.role for part in fused.parts} == {"query", "gate", "key", "value"}


def test_map_refuses_a_module_of_another_shape():
    model = build()
    other = chunk(model)
    with pytest.raises(ValueError, match=r"linear_qkv\.weight: the map expects \(72, 24\), the model has \(144, 24\)"):
        ParameterMap([other], model, 0, 2)


def test_marks_tell_split_from_replicated():
    model = build()
    found = ParameterMap([chunk(model, 0, 2)], model, 0, 2)
    found.mark_tensor_parallel()
    marks = {t.name: (t.parameter.tensor_model_parallel, t.parameter.partition_dim) for t in found}
    assert marks["decoder.layers.0.self_attention.linear_qkv.weight"] == (True, 0)
    assert marks["decoder.layers.0.self_attention.linear_proj.weight"] == (True, 1)
    assert marks["decoder.layers.0.mlp.linear_fc2.weight"] == (True, 1)
    assert marks["decoder.layers.0.self_attention.q_layernorm.weight"] == (False, -1)
    assert all(isinstance(tensor, MappedTensor) and tensor.is_split == marks[tensor.name][0] for tensor in found)
