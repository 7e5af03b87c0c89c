"""Tables by published names. The libraries themselves are not installed here: names and shapes are written out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from megagamma.adapters.blocks import Constant
from megagamma.adapters.libraries import library_plan


def model_of(config: Any, **attributes: Any) -> nn.Module:
    """A module with that config, and one inside with these attributes."""
    model = nn.Module()
    model.config, model.inner = config, nn.Module()  # type: ignore[assignment]
    for name, value in attributes.items():
        setattr(model.inner, name, value)
    return model


def test_torchtitan() -> None:
    layer = {
        "attention.wq.weight": (64, 64), "attention.wk.weight": (32, 64), "attention.wv.weight": (32, 64),
        "attention.wo.weight": (64, 64), "feed_forward.w1.weight": (96, 64), "feed_forward.w2.weight": (64, 96),
        "feed_forward.w3.weight": (96, 64), "attention_norm.weight": (64,), "ffn_norm.weight": (64,),
    }  # fmt: skip
    shapes = {"tok_embeddings.weight": (100, 64), "norm.weight": (64,), "output.weight": (100, 64)}
    shapes |= {f"layers.1.{name}": shape for name, shape in layer.items()}
    plan = library_plan("torchtitan", model_of(SimpleNamespace(dim=64, n_layers=2, norm_eps=1e-5)), shapes)
    assert plan.entries.keys() == shapes.keys() and (plan.hidden_size, plan.num_layers, plan.epsilon) == (64, 2, 1e-5)
    names = {name: one.role for name, one in plan.logical().items()}
    assert names["model.layers.1.mlp.gate_proj.weight"] == "mlp_gate" and len(names) == 9
    assert plan.entries["layers.1.feed_forward.w2.weight"][0].logical.name == "model.layers.1.mlp.down_proj.weight"
    newer = library_plan(
        "torchtitan", model_of(SimpleNamespace(dim=64)), {"layers.0.attention.qkv_linear.wk.weight": (32, 64)}
    )
    assert list(newer.logical()) == ["model.layers.0.self_attn.k_proj.weight"]
    # Fused: two groups of two queries, a key and a value, heads of 16. Layers are a list.
    model = model_of(SimpleNamespace(dim=64, layers=[0, 1, 2]), heads_per_kv=2, head_dim=16)
    fused = library_plan("torchtitan", model, {"layers.0.attention.qkv_linear.wqkv.weight": (128, 64)})
    blocks = fused.entries["layers.0.attention.qkv_linear.wqkv.weight"]
    assert [(one.logical.role, one.start[0], one.box[0]) for one in blocks] == [
        ("query", 0, (0, 32)), ("key", 0, (32, 48)), ("value", 0, (48, 64)),
        ("query", 32, (64, 96)), ("key", 16, (96, 112)), ("value", 16, (112, 128)),
    ]  # fmt: skip
    assert fused.num_layers == 3 and fused.logical()["model.layers.0.self_attn.q_proj.weight"].shape == (64, 64)


def test_litgpt() -> None:
    config = SimpleNamespace(n_embd=64, n_layer=2, n_head=4, head_size=16, n_query_groups=2, norm_eps=1e-6)
    shapes = {
        "lm_head.weight": (100, 64), "transformer.wte.weight": (100, 64), "transformer.ln_f.weight": (64,),
        "transformer.h.0.norm_1.weight": (64,), "transformer.h.0.norm_2.weight": (64,),
        "transformer.h.0.attn.qkv.weight": (128, 64), "transformer.h.0.attn.qkv.bias": (128,),
        "transformer.h.0.attn.norm_q.weight": (16,), "transformer.h.0.attn.norm_k.weight": (16,),
        "transformer.h.0.attn.proj.weight": (64, 64), "transformer.h.0.mlp.fc_1.weight": (96, 64),
        "transformer.h.0.mlp.fc_2.weight": (96, 64), "transformer.h.0.mlp.proj.weight": (64, 96),
    }  # fmt: skip
    plan = library_plan("litgpt", model_of(config), shapes)
    assert plan.entries.keys() == shapes.keys() and plan.qk_norm
    blocks = plan.entries["transformer.h.0.attn.qkv.weight"]
    assert [(one.logical.role, one.logical.shape, one.box[0]) for one in blocks] == [
        ("query", (64, 64), (0, 64)), ("key", (32, 64), (64, 96)), ("value", (32, 64), (96, 128)),
    ]  # fmt: skip
    assert plan.entries["transformer.h.0.attn.qkv.bias"] == Constant(0.0, "bias")
    plain = library_plan("litgpt", model_of(config), {"transformer.h.0.mlp.fc.weight": (96, 64)})
    assert plain.logical()["model.layers.0.mlp.up_proj.weight"].role == "mlp_up"


def test_litgpts_gemma() -> None:
    config = SimpleNamespace(n_embd=64, n_layer=2, name="Gemma-2b", scale_embeddings=True, norm_eps=1e-6)
    plan = library_plan("litgpt", model_of(config), {"transformer.ln_f.weight": (64,)})
    assert plan.entries["transformer.ln_f.weight"] == Constant(0.0, "norm") and plan.input_scale == 8.0
