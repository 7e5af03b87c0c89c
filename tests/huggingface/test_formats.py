"""Which class holds which model, and that tensors and configs go there and back, without a process of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagamma.config.schema import Config, ModelConfig, resolve_model
from megagamma.errors import ConfigurationError
from megagamma.huggingface.formats import (
    FORMATS,
    Format,
    choose_format,
    export_config,
    export_tensor,
    exported_tensors,
    import_config,
    import_tensor,
)
from megagamma.model.parameters import logical_parameters

SPECIAL: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 3}


def model_of(gate: Any = "none", qk_norm: bool = True, **more: Any) -> ModelConfig:
    shape = {"hidden_size": 24, "num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 8}
    given = {**shape, "ffn_hidden_size": 40, "vocab_size": 50, "vocab_size_multiple": 16, **more}
    return resolve_model(
        ModelConfig(
            attention_gate=gate, qk_norm=qk_norm, allow_gate_without_qk_norm=gate != "none" and not qk_norm, **given
        )
    )


CASES = [
    (target, gate) for target in FORMATS.values() for gate in target.gates
]  # every class with every gate that it holds


@pytest.mark.parametrize(
    ("gate", "qk_norm", "key"),
    [
        ("none", False, "llama"),
        ("none", True, "qwen3"),
        ("elementwise", True, "qwen3_5"),
        ("headwise", True, "qwen3_5"),
    ],
)
def test_the_first_class_that_fits(gate: str, qk_norm: bool, key: str) -> None:
    assert choose_format(model_of(gate, qk_norm)).key == key


def test_a_requested_class() -> None:
    assert choose_format(model_of("headwise"), "lfm3").key == "lfm3"
    with pytest.raises(
        ConfigurationError, match=r"--hf_class lfm3 cannot hold .*=elementwise.*: use qwen3_5 or qwen3_next"
    ):
        choose_format(model_of("elementwise"), "lfm3")
    with pytest.raises(ConfigurationError, match="no stock Hugging Face class has a gate without q/k-norm"):
        choose_format(model_of("elementwise", False))
    assert choose_format(model_of("elementwise", False), custom_code=True).key == "gated_llama"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("target", "gate"), CASES, ids=lambda value: getattr(value, "key", value))
def test_tensors_go_there_and_back_to_the_bit(target: Format, gate: str, tied: bool) -> None:
    model = model_of(gate, target.qk_norm, tie_embeddings=tied)
    generator = torch.Generator().manual_seed(1)
    logical = {one.name: torch.randn(one.shape, generator=generator) for one in logical_parameters(model)}

    def read(name: str, rows: int | None) -> Tensor:
        return logical[name] if rows is None else logical[name][:rows]

    tensors = exported_tensors(model, target)
    stored = {one.name: export_tensor(one, model, target, read).contiguous() for one in tensors}
    assert {name: tuple(value.shape) for name, value in stored.items()} == {one.name: one.shape for one in tensors}
    assert ("lm_head.weight" in stored) is not tied
    for parameter in logical_parameters(model):
        back = import_tensor(parameter, model, target, lambda name, rows: stored[name])
        expected = logical[parameter.name].clone()
        if parameter.role in ("embedding", "head"):
            assert parameter.shape[0] == 64 and stored[target.name(parameter.name)].shape[0] == 50
            expected[50:] = 0
        if parameter.role == "norm" and target.norm_offset:
            assert torch.allclose(back, expected, atol=1e-6)  # stored as gain - 1
        else:
            assert torch.equal(back, expected), parameter.name


def test_a_gate_lies_behind_the_query_of_its_head() -> None:
    """Rows of q_proj by hand: head 0's query, head 0's gate, head 1's query, ..."""
    model, target = model_of("headwise"), FORMATS["qwen3_5"]
    name = "model.layers.1.self_attn.q_proj.weight"
    tensor = next(one for one in exported_tensors(model, target) if one.name == name)
    query = torch.arange(32.0).unsqueeze(1).expand(32, 24)
    gate = 100 + torch.arange(4.0).unsqueeze(1).expand(4, 24)
    values = export_tensor(tensor, model, target, lambda name, rows: query if "q_proj" in name else gate)
    assert values[:, 0].tolist() == [
        row for head in range(4) for row in [*range(8 * head, 8 * head + 8), *[100 + head] * 8]
    ]


def config_of(model: ModelConfig) -> Config:
    return replace(Config(), model=model)


@pytest.mark.parametrize(("target", "gate"), CASES, ids=lambda value: getattr(value, "key", value))
def test_configs_go_there_and_back(target: Format, gate: str) -> None:
    model = model_of(gate, target.qk_norm, norm_epsilon=1e-7, rope_theta=5e5)
    config = config_of(model)
    values = export_config(config, target, torch.bfloat16, SPECIAL, {"name": "x"})
    back, source, context_length = import_config(values, lambda: gate == "headwise")
    back.vocab_size_multiple = 16
    assert resolve_model(back) == model and source is target
    assert context_length == config.data.sequence_length
    assert values["dtype"] == values["torch_dtype"] == "bfloat16" and values["eos_token_id"] == 2
    assert values["megagamma"] == {"name": "x"} and values["vocab_size"] == 50


@pytest.mark.parametrize(
    ("key", "gate", "changes", "message"),
    [
        (
            "llama",
            "none",
            {"architectures": ["GPT2LMHeadModel"]},
            "architectures=GPT2LMHeadModel: must be one of Llama",
        ),
        ("llama", "none", {"mlp_bias": True}, "mlp_bias=True: must be False"),
        ("llama", "none", {"rope_scaling": {"type": "linear"}}, "rope_type=linear: must be default"),
        ("qwen3", "none", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3_next", "headwise", {"num_experts": None}, "num_experts=None: must be 0"),
        ("qwen3_5", "headwise", {"layer_types": None}, "must name full_attention for every layer"),
        ("lfm3", "headwise", {"norm_eps": None}, "norm_eps=None: must be written"),
        ("llama", "none", {"hidden_size": 1.5}, "hidden_size=1.5: must be a whole number"),
    ],
)
def test_configs_without_a_counterpart(key: str, gate: str, changes: dict[str, Any], message: str) -> None:
    target = FORMATS[key]
    values = export_config(config_of(model_of(gate, target.qk_norm)), target, torch.float32, SPECIAL, {})
    import_config(values, lambda: True)
    with pytest.raises(ConfigurationError) as caught:
        import_config({**values, **changes}, lambda: True)
    assert message in str(caught.value)
