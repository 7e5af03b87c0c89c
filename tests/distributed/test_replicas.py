"""Drift between copies of a weight is seen, and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ranks import RankPool
from support.train import batches, build_engine

from megagamma.distributed.replicas import fingerprint


def _down(engine: Any) -> Any:
    return next(tensor for tensor in engine.map if tensor.name.endswith("2.mlp.linear_fc2.weight"))


def _norm(engine: Any) -> Any:
    return next(tensor for tensor in engine.map if tensor.name.endswith("1.pre_mlp_layernorm.weight"))


def _flip(values: torch.Tensor) -> None:
    """One bit, the last of a mantissa."""
    values.detach().view(-1).view(torch.int32)[5] ^= 1


def drift(arguments: list[str], fault: str) -> str:
    """Train a few steps with a fault planted; returns what the check says, or ""."""
    from megagamma.distributed import engine as engine_module
    from megagamma.distributed.replicas import check_gradients, check_replicas
    from megagamma.errors import TrainingError

    original = engine_module.sum_replicated_gradients
    if fault == "no reduction":
        engine_module.sum_replicated_gradients = lambda parameter_map: 0
    try:
        config, engine = build_engine(arguments)
    finally:
        engine_module.sum_replicated_gradients = original
    engine.set_learning_rate(0.003)
    try:
        for step in range(1, 4):
            engine.forward_backward(batches(config, engine, step))
            if fault == "gradient" and step == 2 and engine.runtime.rank == 1:
                _flip(_down(engine).parameter.grad)
            if fault == "gradient of a norm" and step == 2 and engine.runtime.rank == 1:
                _flip(_norm(engine).parameter.grad)
            check_gradients(engine)
            engine.step()
            if fault == "moment" and step == 2 and engine.runtime.rank == 1:
                _flip(engine.state.adam.state[_down(engine).parameter]["exp_avg_sq"])
            if fault == "moment of a norm" and step == 2 and engine.runtime.rank == 1:
                moment = engine.state.get(_norm(engine), "exp_avg").clone()
                _flip(moment)
                engine.state.set(_norm(engine), "exp_avg", moment)
            if fault == "bit" and step == 2 and engine.runtime.rank == 1:
                _down(engine).parameter.data.view(torch.int32)[3, 5] ^= 1
            check_replicas(engine)
    except TrainingError as error:
        return str(error)
    finally:
        engine.close()
    return ""


TENSOR = ["--parallel.tensor", "2"]
SEQUENCE = [*TENSOR, "--parallel.sequence", "true"]


@pytest.mark.parametrize("layout", [[], TENSOR, SEQUENCE, ["--parallel.pipeline", "2"]], ids=["dp", "tp", "sp", "pp"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_sound_runs_pass(two_ranks: RankPool, data_cache: str, layout: list[str], tied: str) -> None:
    arguments = ["--data.cache", data_cache, "--model.tie_embeddings", tied, *layout]
    assert two_ranks.run(drift, arguments, "") == ["", ""]


@pytest.mark.parametrize("layout", [TENSOR, SEQUENCE], ids=["tp", "sp"])
def test_a_missed_reduction_is_named(two_ranks: RankPool, data_cache: str, layout: list[str]) -> None:
    for message in two_ranks.run(drift, ["--data.cache", data_cache, *layout], "no reduction"):
        assert "tensor-parallel ranks [0, 1]" in message
        assert "norm" in message
        assert "model.layers.0." in message


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_flipped_bit_is_named(two_ranks: RankPool, data_cache: str, stage: int) -> None:
    arguments = ["--data.cache", data_cache, "--deepspeed_config", f"configs/deepspeed/zero{stage}.json"]
    for message in two_ranks.run(drift, arguments, "bit"):
        assert "model.layers.2.mlp.down_proj.weight" in message
        assert "data-parallel ranks [0, 1]" in message


@pytest.mark.parametrize(("fault", "what"), [("moment", "exp_avg_sq of "), ("gradient", "the gradient of ")])
def test_a_flipped_bit_of_a_moment_or_gradient_is_named(
    two_ranks: RankPool, data_cache: str, fault: str, what: str
) -> None:
    """Under ZeRO 0, where each data-parallel rank has all of them."""
    arguments = ["--data.cache", data_cache, "--deepspeed_config", "configs/deepspeed/zero0.json"]
    for message in two_ranks.run(drift, arguments, fault):
        assert f"the copies of {what}model.layers.2.mlp.down_proj.weight differ over the data-parallel ranks" in message


@pytest.mark.parametrize(
    ("stage", "fault", "what"),
    [
        pytest.param(0, "moment of a norm", "exp_avg of ", marks=pytest.mark.slow),
        (1, "moment of a norm", "exp_avg of "),
        (0, "gradient of a norm", "the gradient of "),
        pytest.param(2, "moment of a norm", "exp_avg of ", marks=pytest.mark.slow),
        pytest.param(3, "moment of a norm", "exp_avg of ", marks=pytest.mark.slow),
    ],
)
def test_so_is_one_of_a_norm_over_tensor_parallel_ranks(
    two_ranks: RankPool, data_cache: str, stage: int, fault: str, what: str
) -> None:
    zero = ("--deepspeed_config", f"configs/deepspeed/zero{stage}.json")
    for message in two_ranks.run(drift, ["--data.cache", data_cache, *TENSOR, *zero], fault):
        assert f"{what}model.layers.1.post_attention_layernorm.weight differ over the tensor-parallel" in message


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_sound_runs_pass_under_any_stage(two_ranks: RankPool, data_cache: str, stage: int) -> None:
    zero = ("--deepspeed_config", f"configs/deepspeed/zero{stage}.json")
    for layout in ([], TENSOR):
        assert two_ranks.run(drift, ["--data.cache", data_cache, *layout, *zero], "") == ["", ""]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_sees_bits_and_order(dtype: torch.dtype) -> None:
    values = torch.randn(5, 3000).to(dtype)
    known = fingerprint(values)
    assert known.equal(fingerprint(values.clone()))
    swapped = values[[1, 0, 2, 3, 4]]
    assert not known.equal(fingerprint(swapped))
    flipped = values.clone()
    flipped.view(torch.int16)[4, 77] ^= 1
    assert not known.equal(fingerprint(flipped))
