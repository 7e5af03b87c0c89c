"""transformers' classes: the bits of this project's exports, a role for every parameter, and known traps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.exports import SHAPE, VARIANTS
from support.ranks import RankPool
from support.train import run_trainer

import megagamma
from megagamma.errors import MegagammaError
from megagamma.huggingface.export import ExportOptions, export
from megagamma.huggingface.native import parity_outputs
from megagamma.initialization.streams import normal_

WIDTHS = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "intermediate_size": 160, "vocab_size": 300,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**WIDTHS, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**WIDTHS),
    "qwen2": lambda: transformers.Qwen2Config(**WIDTHS),
    "qwen3": lambda: transformers.Qwen3Config(**WIDTHS, tie_word_embeddings=True),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**WIDTHS, **LINEAR),
    "olmo2": lambda: transformers.Olmo2Config(**WIDTHS),
    "gemma3": lambda: transformers.Gemma3TextConfig(**WIDTHS),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **WIDTHS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160, vocab_size=300
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_inner=160, vocab_size=300, n_positions=32
    ),
}


def build(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())


def drawn(name: str, shape: tuple[int, int], std: float, seed: int = 1234) -> torch.Tensor:
    return normal_(torch.empty(shape), seed=seed, name=name, global_shape=shape, std=std)


@pytest.mark.parametrize(
    ("variant", "hf_class"),
    [("plain", None), ("qk_norm", None), ("elementwise", None), ("headwise", "lfm3"), ("gate alone", None)],
)
def test_the_bits_of_an_exported_step_0(
    tmp_path: Path, one_rank: RankPool, data_cache: str, variant: str, hf_class: str | None
) -> None:
    run = tmp_path / "run"
    given = ["--data.cache", data_cache, *SHAPE, *VARIANTS[variant], "--run.folder", str(run), "--run.steps", "1"]
    assert one_rank.run(run_trainer, [*given, "--checkpoint.save_initial", "true", "--init.gamma", "0.7"]) == [0]
    folder = export(
        run / "checkpoints" / "step_00000000",
        tmp_path / "hf",
        ExportOptions(hf_class=hf_class, custom_code=True),
        native=lambda inputs: one_rank.run(parity_outputs, inputs)[0],
        say=lambda _: None,
        quiet=True,
    )
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    megagamma.initialize(fresh, gamma=0.7).check()
    expected, found = exported.state_dict(), fresh.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    megagamma.initialize(fresh, gamma=0.7, seed=1)
    assert not torch.equal(fresh.state_dict()["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_role(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    report = megagamma.initialize(model, gamma=0.8)
    report.check()
    assert {row.role for row in report.matrices} >= {"embedding", "query", "key", "value", "attention_output"}
    left = [one for one, parameter in model.named_parameters() if (parameter == 7.0).any()]
    assert left == list(report.kept) and (left == []) is (name != "qwen3_5")
    for one, parameter in model.named_parameters():
        if one.endswith("bias") and one not in report.kept:
            assert (parameter == 0).all()
    for module in model.modules():
        # Whatever its gain is stored as, a norm that is an identity gives numbers of unit rms their own size.
        if "RMSNorm" in type(module).__name__ and "Gated" not in type(module).__name__:
            x = torch.randn(3, 5, module.weight.numel(), generator=torch.Generator().manual_seed(1))
            unit = x / x.square().mean(-1, keepdim=True).sqrt()
            assert torch.allclose(module(unit), unit, atol=1e-4)
    if name == "qwen3_5":
        return  # what is kept is 7 here
    logits = model(torch.arange(20).unsqueeze(0)).logits
    assert torch.isfinite(logits).all() and logits.abs().max() > 0


def test_a_model_that_lost_its_tie() -> None:
    """`to_empty` gives a tied head memory of its own."""
    with torch.device("meta"):
        model = build("qwen3")
    model.to_empty(device="cpu")
    with pytest.raises(MegagammaError, match=r"tie_weights\(\) first, as after model\.to_empty"):
        megagamma.initialize(model)
    model.tie_weights()
    megagamma.initialize(model).check()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_norms_behind_what_they_norm_are_not_judged() -> None:
    assert megagamma.initialize(build("qwen2"), dry_run=True).norms
    report = megagamma.initialize(build("olmo2"), dry_run=True)
    assert report.norms == [] and "not known for this model" in str(report)


def test_gpt2_is_stored_in_out() -> None:
    """d_in is the number of inputs, which for a Conv1D is the first axis: the wrong one would draw c_proj by 64, not 160."""
    model = build("gpt2")
    report = megagamma.initialize(model, gamma=1.0)
    layer, depth = model.transformer.h[1], 1 / math.sqrt(2 * 2)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(layer.mlp.c_proj.weight, drawn(name, (64, 160), depth / 160).t())
    assert not torch.equal(layer.mlp.c_proj.weight, drawn(name, (64, 160), depth / 64).t())
    assert {row.name: row.d_in for row in report.matrices}[name] == 160
    query, key, value = layer.attn.c_attn.weight.split(64, dim=1)
    for short, found in (("q", query), ("k", key), ("v", value)):
        assert torch.equal(found, drawn(f"model.layers.1.self_attn.{short}_proj.weight", (64, 64), 1 / 64).t())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, drawn("model.embed_tokens.weight", (300, 64), 1 / 64))
    assert "head" not in {row.role for row in report.matrices}, "a tied one is drawn once, as the embedding"


def test_gpt_neox_heads_lie_one_after_the_other() -> None:
    model = build("gpt_neox")
    megagamma.initialize(model, gamma=1.0)
    fused = model.gpt_neox.layers[0].attention.query_key_value.weight
    for place, short in enumerate("qkv"):
        whole = drawn(f"model.layers.0.self_attn.{short}_proj.weight", (64, 64), 1 / 64)
        for head in range(4):
            rows = fused[48 * head + 16 * place : 48 * head + 16 * (place + 1)]
            assert torch.equal(rows, whole[16 * head : 16 * (head + 1)])
    # Which rows are whose is what the forward pass makes of them: without values attention adds nothing.
    with torch.no_grad():
        for layer in model.gpt_neox.layers:
            layer.attention.query_key_value.weight.view(4, 3, 16, 64)[:, 2] = 0
    tokens = torch.arange(8).unsqueeze(0)
    attended: list[torch.Tensor] = []
    model.gpt_neox.layers[0].attention.dense.register_forward_hook(lambda *x: attended.append(x[2]))
    model(tokens)
    assert attended[0].abs().max() == 0


def test_qwen3_5_fused_tensors() -> None:
    model = build("qwen3_5")
    megagamma.initialize(model, gamma=1.0)
    linear, full = model.model.layers[0].linear_attn, model.model.layers[1].self_attn
    rows = linear.in_proj_qkv.weight.split([32, 32, 32])
    for short, found in zip("qkv", rows, strict=True):
        assert torch.equal(found, drawn(f"model.layers.0.linear_attn.{short}_proj.weight", (32, 64), 1 / 64))
    by_head = full.q_proj.weight.view(4, 2, 24, 64)
    for place, short in enumerate(("q", "gate")):
        expected = drawn(f"model.layers.1.self_attn.{short}_proj.weight", (96, 64), 1 / 64)
        assert torch.equal(by_head[:, place].reshape(96, 64), expected)


def test_stacked_experts_are_the_single_ones() -> None:
    model = build("qwen3_moe")
    report = megagamma.initialize(model, gamma=1.0)
    experts = model.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj[3].split(48)
    prefix = "model.layers.1.mlp.experts.3"
    assert torch.equal(gate, drawn(f"{prefix}.gate_proj.weight", (48, 64), 1 / 64))
    assert torch.equal(up, drawn(f"{prefix}.up_proj.weight", (48, 64), 1 / 64))
    assert torch.equal(experts.down_proj[3], drawn(f"{prefix}.down_proj.weight", (64, 48), 0.5 / 48))
    assert {"router", "expert_gate", "expert_up", "expert_down"} <= {row.role for row in report.roles}
    own = megagamma.initialize(model, gamma=0.5, exponents={"router": 1.0, "expert_down": 0.9})
    targets = {row.role: row.asked_std for row in own.matrices}
    assert targets["router"] == pytest.approx(1 / 64) and targets["expert_down"] == pytest.approx(48**-0.9 / 2)
