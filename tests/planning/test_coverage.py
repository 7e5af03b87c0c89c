"""Slices of all ranks against the model: complete ones pass, and each mistake is noticed by name."""

import dataclasses

import pytest
from support.shapes import small

from megagamma.config.resolve import resolve
from megagamma.config.schema import Config
from megagamma.model.parameters import Part, logical_parameters, parts_of
from megagamma.planning import drawing
from megagamma.planning.coverage import HeldTensor, coverage_problems
from megagamma.planning.drawing import measure_drawing

T, P = 2, 2
LAYER = (
    "input_layernorm.weight", "self_attention.linear_qkv.weight", "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight", "self_attention.linear_proj.weight", "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
)  # fmt: skip


def held(model):
    """What the ranks of tensor 2 x pipeline 2 hold, by the map alone; real models: tests/test_rehearsal.py."""
    found = {}
    for p in range(P):
        per_stage = model.num_layers // P
        names = [f"decoder.layers.{layer}.{name}" for layer in range(per_stage) for name in LAYER]
        names = ["embedding.word_embeddings.weight", *names] if p == 0 else names
        names += ["decoder.final_layernorm.weight", "output_layer.weight"] if p == P - 1 else []
        for t in range(T):
            tensors = []
            for name in names:
                parts = tuple(parts_of(name, model, p * per_stage, t, T))
                shape = (sum(part.shape[0] for part in parts), *parts[0].columns)
                is_copy = name == "output_layer.weight" and model.tie_embeddings
                tensors.append(HeldTensor(name, shape, parts, is_copy))
            found[t, p] = tensors
    return found


MODEL = small(attention_gate="elementwise", qk_norm=True)


@pytest.mark.parametrize("tied", [False, True])
def test_complete_slices_pass(tied):
    model = small(attention_gate="elementwise", qk_norm=True, tie_embeddings=tied)
    assert coverage_problems(model, held(model), T) == []


def change(found, where, name, number, **fields):
    """Change one part of one tensor."""
    index = next(i for i, tensor in enumerate(found[where]) if tensor.name == name)
    tensor = found[where][index]
    parts = list(tensor.parts)
    parts[number] = dataclasses.replace(parts[number], **fields)
    found[where][index] = dataclasses.replace(tensor, parts=tuple(parts))


def other_rows(found):
    """Tensor rank 1 takes the rows of rank 0 of one of its matrices."""
    change(found, (1, 1), "decoder.layers.0.mlp.linear_fc1.weight", 1, start=(0, 0))


def shifted(found):
    change(found, (1, 0), "embedding.word_embeddings.weight", 0, start=(129, 0))


def narrow(found):
    change(found, (1, 0), "decoder.layers.0.mlp.linear_fc1.weight", 0, columns=(63,))


def other_layer(found):
    """A stage that numbers its layers from 0."""
    index = next(i for i, one in enumerate(found[0, 1]) if one.name == "decoder.layers.0.mlp.linear_fc2.weight")
    parts = tuple(parts_of("decoder.layers.0.mlp.linear_fc2.weight", MODEL, 0, 0, T))
    found[0, 1][index] = dataclasses.replace(found[0, 1][index], parts=parts)


def lost_norm(found):
    found[1, 1] = [tensor for tensor in found[1, 1] if tensor.name != "decoder.final_layernorm.weight"]


def lost_matrix(found):
    for t in range(T):
        found[t, 0] = [tensor for tensor in found[t, 0] if not tensor.name.endswith("linear_proj.weight")]


def overlapping_rows(found):
    change(found, (0, 0), "decoder.layers.0.mlp.linear_fc1.weight", 1, rows=(79, 159))


def stranger(found):
    logical = dataclasses.replace(logical_parameters(MODEL)[0], name="model.other.weight")
    found[0, 0].append(HeldTensor("other", (256, 64), (Part(logical, (0, 0), (0, 256), (64,)),), False))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (other_rows, "model.layers.1.mlp.up_proj.weight: two ranks hold the same of axis 0: 0 to 79 of tensor rank 0"),
        (shifted, "model.embed_tokens.weight: embedding.word_embeddings.weight of tensor rank 1 on stage 0 holds 129 to 256"),
        (narrow, "model.layers.0.mlp.gate_proj.weight: decoder.layers.0.mlp.linear_fc1.weight of tensor rank 1 on stage 0 "
                 "holds 63 of 64 along axis 1"),
        (other_layer, "model.layers.0.mlp.down_proj.weight: stages 0, 1 hold it: one must"),
        (other_layer, "model.layers.1.mlp.down_proj.weight: no rank holds 0 to 79 of axis 1"),
        (lost_norm, "model.norm.weight: tensor ranks [0] hold it whole: each of 0 to 1 must, once"),
        (lost_matrix, "model.layers.0.self_attn.o_proj.weight: no rank holds it"),
        (overlapping_rows, "model.layers.0.mlp.up_proj.weight: two parts have row 79"),
        (stranger, "model.other.weight: other of tensor rank 0 on stage 0 holds it, the model has no such matrix"),
    ],
)  # fmt: skip
def test_each_mistake_is_noticed_by_name(mistake, message):
    found = held(MODEL)
    mistake(found)
    problems = coverage_problems(MODEL, found, T)
    assert any(problem.startswith(message) for problem in problems), problems


def drawn(monkeypatch, rows=200_000, draw=None):
    config = Config()
    config.model, config.data.corpus = small(hidden_size=64, vocab_size=rows), "tiny"
    resolve(config)
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if draw:
        monkeypatch.setattr(drawing, "draw", draw)
    logical = logical_parameters(config.model)[0]
    return measure_drawing(config, Part(logical, (0, 0), (0, rows), (64,)), torch.bfloat16)


def test_drawing_takes_the_stated_memory_and_more_is_noticed(monkeypatch):
    found = drawn(monkeypatch)
    assert found.problem == ""
    # 0: its buffers fit into what the process holds already.
    assert found.beyond_bytes is None or 0 <= found.beyond_bytes <= found.stated_bytes < found.slice_bytes
    if found.beyond_bytes is None:
        pytest.skip("this system does not tell a process's peak memory")
    whole = drawn(monkeypatch, draw=lambda tensor, out, config: out.copy_(out.float().normal_()))
    assert whole.problem.startswith("model.embed_tokens.weight: drawing a slice 200000x64 took ")
    assert "MiB beyond the slice, 13.0 MiB are stated" in whole.problem


def test_a_slice_that_does_not_fit_here_is_named(monkeypatch):
    monkeypatch.setattr(drawing, "available_bytes", lambda: 20 * 2**20)
    with pytest.raises(
        Exception, match=r"model.embed_tokens.weight: a slice 200000x64 takes 0.02 GiB, and 0.02 GiB are left"
    ):
        drawn(monkeypatch)
