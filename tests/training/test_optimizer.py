"""Parameter groups: matrices decay, gains do not, and every role has the factor that the config gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megagamma.config.schema import Config, InitConfig, ModelConfig, OptimizerConfig, resolve_model
from megagamma.model.parameters import ParameterMap, logical_parameters
from megagamma.training.optimizer import describe_groups, parameter_groups

MODEL = resolve_model(
    ModelConfig(
        hidden_size=8, num_layers=2, num_attention_heads=2, num_query_groups=1, head_dim=6, ffn_hidden_size=12,
        vocab_size=16, vocab_size_multiple=16, attention_gate="elementwise", qk_norm=True,
    )
)  # fmt: skip
# Megatron's names and shapes of that model on one process.
OUTER = {
    "embedding.word_embeddings.weight": (16, 8),
    "decoder.final_layernorm.weight": (8,),
    "output_layer.weight": (16, 8),
}
LAYER = {
    "input_layernorm.weight": (8,),
    "self_attention.linear_qkv.weight": (12 + 12 + 6 + 6, 8),
    "self_attention.q_layernorm.weight": (6,),
    "self_attention.k_layernorm.weight": (6,),
    "self_attention.linear_proj.weight": (8, 12),
    "pre_mlp_layernorm.weight": (8,),
    "mlp.linear_fc1.weight": (24, 8),
    "mlp.linear_fc2.weight": (8, 12),
}


class Module(torch.nn.Module):
    """Parameters under Megatron's names."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {**OUTER, **{f"decoder.layers.{n}.{name}": shape for n in (0, 1) for name, shape in LAYER.items()}}
        for name, shape in shapes.items():
            module: torch.nn.Module = self
            *path, leaf = name.split(".")
            for word in path:
                if not hasattr(module, word):
                    module.add_module(word, torch.nn.ModuleList() if word == "layers" else torch.nn.Module())
                module = getattr(module, word)
            module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape)))
        for number, layer in enumerate(self.decoder.layers.children()):  # type: ignore[union-attr]
            layer.layer_number = number + 1  # type: ignore[assignment]


def config_of(init: InitConfig | None = None, **options: Any) -> Config:
    return Config(model=MODEL, init=init or InitConfig(), optimizer=OptimizerConfig(**{"weight_decay": 0.1, **options}))


def groups_of(**options: Any) -> tuple[ParameterMap, list[dict[str, Any]]]:
    parameter_map = ParameterMap([Module()], MODEL, 0, 1)
    return parameter_map, parameter_groups(parameter_map, config_of(**options))


def settings_by_name(parameter_map: ParameterMap, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(weight decay, factor) of every parameter; each must be in exactly one group."""
    found: dict[int, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group["weight_decay"], group["lr_factor"])
    names = {id(tensor.parameter): tensor.name for tensor in parameter_map}
    assert found.keys() == names.keys()
    return {names[key]: value for key, value in found.items()}


def test_matrices_decay_and_gains_do_not() -> None:
    parameter_map, groups = groups_of()
    assert len(groups) == 2
    for name, (decay, factor) in settings_by_name(parameter_map, groups).items():
        assert decay == (0.0 if "layernorm" in name else 0.1), name
        assert factor == 1.0


def test_everything_decays_when_the_config_says_so() -> None:
    _, groups = groups_of(decay="all")
    assert [group["weight_decay"] for group in groups] == [0.1]


def test_factors_of_roles() -> None:
    parameter_map, groups = groups_of(lr_factors={"embedding": 10.0, "mlp_down": 0.5, "norm": 2.0})
    found = settings_by_name(parameter_map, groups)
    assert found["embedding.word_embeddings.weight"] == (0.1, 10.0)
    assert found["output_layer.weight"] == (0.1, 1.0)
    assert found["decoder.layers.1.mlp.linear_fc2.weight"] == (0.1, 0.5)
    assert found["decoder.layers.1.mlp.linear_fc1.weight"] == (0.1, 1.0)
    assert found["decoder.layers.0.self_attention.q_layernorm.weight"] == (0.0, 2.0)
    assert len(groups) == 4


def test_mup_scales_the_rates_of_all_but_embedding_and_gains() -> None:
    """A quarter of the base rate at four times the base width, times what the config asks for."""
    init = InitConfig(scheme="mup", mup_base_width=MODEL.hidden_size // 4)
    found = settings_by_name(*groups_of(init=init, lr_factors={"mlp_down": 0.5}))
    for name, (_, factor) in found.items():
        expected = 1.0 if "embedding" in name or "layernorm" in name else 0.125 if "linear_fc2" in name else 0.25
        assert factor == expected, name


def test_groups_are_what_torchs_adamw_takes() -> None:
    _, groups = groups_of(lr_factors={"embedding": 10.0})
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [group["lr_factor"] for group in optimizer.param_groups] == [group["lr_factor"] for group in groups]


@pytest.mark.parametrize("factors", [{}, {"embedding": 10.0}])
def test_description_counts_every_weight_once(factors: dict[str, float]) -> None:
    parameter_map, groups = groups_of(lr_factors=factors)
    lines = describe_groups(parameter_map, config_of(lr_factors=factors))
    assert len(lines) == len(groups)
    counts = [int(line.split(": ")[1].split(" ")[0].replace(",", "")) for line in lines]
    assert sum(counts) == sum(logical.numel for logical in logical_parameters(MODEL))
    (gains,) = [line for line in lines if "norm" in line]
    assert gains.startswith("weight decay 0, learning rate x1: ")
    if factors:
        assert "weight decay 0.1, learning rate x10: 128 parameters (embedding)" in lines
