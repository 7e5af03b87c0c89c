"""A layer as one function equals the modules that it stands for, compiled too; and they are called where they are needed."""

from __future__ import annotations

from typing import Any

import pytest
from support.ranks import RankPool

SHAPE = [
    *("--data.corpus", "tiny", "--model.hidden_size", "64", "--model.num_attention_heads", "4"),
    *("--model.num_query_groups", "2", "--model.head_dim", "24", "--model.num_layers", "1"),
    *("--model.vocab_size", "96", "--data.sequence_length", "16", "--init.gamma", "0.5"),
    *("--model.allow_gate_without_qk_norm", "true"),
]
TOLERANCE = 1e-5


def layer_of(arguments: list[str], dtype: Any = None) -> tuple[Any, Any]:
    """(layer, table of rotations) of a filled model, with gains other than 1, or a misplaced norm would not be seen."""
    import torch

    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.model.gpt import build_model
    from megagamma.model.initialize import fill
    from megagamma.model.parameters import ParameterMap

    config = parse_config([*SHAPE, *arguments])
    chunk = build_model(config, dtype or torch.float32, Runtime(config).device)[0]
    parameter_map = ParameterMap([chunk], config.model, 0, 1)
    fill(parameter_map, config)
    generator = torch.Generator().manual_seed(1)
    for tensor in parameter_map:
        if tensor.role == "norm":
            tensor.parameter.data.uniform_(0.5, 1.5, generator=generator)
    chunk.rotary_pos_emb.set_positions(torch.arange(16).unsqueeze(0), consecutive=True)
    return chunk.decoder.layers[0], chunk.rotary_pos_emb()


def differences(arguments: list[str], compiled: bool) -> dict[str, float]:
    """Largest relative differences of output and gradients between the function and the modules."""
    import torch
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megagamma.model.regions import compile_regions

    layer, table = layer_of(arguments)
    x = torch.randn(16, 3, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    weight = torch.randn(16, 3, 64, generator=torch.Generator().manual_seed(3))

    def results(forward: Any) -> list[torch.Tensor]:
        output, _ = forward(hidden_states=x, attention_mask=None, rotary_pos_emb=table)
        return [output, *torch.autograd.grad(output, [x, *layer.parameters()], weight)]

    def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return max(float((one - two).abs().max() / two.abs().max()) for one, two in zip(a, b, strict=True))

    expected = results(lambda **inputs: TransformerLayer.forward(layer, **inputs))
    compile_regions(compiled)
    try:
        found = results(layer)
    finally:
        compile_regions(False)
    assert layer._arguments is not None
    with torch.no_grad():
        layer.self_attention.linear_proj.weight[0, 0] += 0.5
    return {"found": distance(found, expected), "control": distance(results(layer), expected)}


@pytest.mark.parametrize("gate", ["none", "elementwise", "headwise"])
@pytest.mark.parametrize("qk_norm", ["true", "false"])
def test_equals_its_modules(one_rank: RankPool, gate: str, qk_norm: str) -> None:
    found = one_rank.run(differences, ["--model.attention_gate", gate, "--model.qk_norm", qk_norm], False)[0]
    assert found["found"] < TOLERANCE < found["control"]


@pytest.mark.slow  # as of whole models in tests/distributed/test_compiled.py
def test_compiled_equals_its_modules(one_rank: RankPool) -> None:
    import torch

    from megagamma.training.choices import compiler_problem

    if problem := compiler_problem(torch.device("cpu")):
        pytest.skip(problem)
    found = one_rank.run(differences, ["--model.attention_gate", "elementwise"], True)[0]
    assert found["found"] < TOLERANCE < found["control"]


def who_is_called(arguments: list[str]) -> list[bool]:
    """Whether the function serves the layer: as it is, with a mask, with a hook inside, and with a weight that ZeRO 3 has
    partitioned."""
    import torch

    layer, table = layer_of(arguments)
    called: list[bool] = []
    inner = layer.mlp.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        called.append(True)
        return inner(*inputs, **named)

    layer.mlp.forward = forward

    def is_function(mask: Any) -> bool:
        called.clear()
        layer(hidden_states=torch.ones(16, 1, 64), attention_mask=mask, rotary_pos_emb=table)
        return not called

    found = [is_function(None), is_function(torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1))]
    handle = layer.self_attention.linear_proj.register_forward_hook(lambda *_: None)
    found.append(is_function(None))
    handle.remove()
    del layer.__dict__["_arguments"]
    layer.mlp.linear_fc1.weight.ds_id = 1
    return [*found, is_function(None)]


def test_modules_are_called_where_they_are_needed(one_rank: RankPool) -> None:
    assert one_rank.run(who_is_called, [])[0] == [True, False, False, False]
    assert one_rank.run(who_is_called, ["--model.recompute", "selective"])[0] == [False] * 4
