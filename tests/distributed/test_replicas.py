"""Drift between copies of a weight is seen, and named."""

from __future__ import annotations

import pytest
import torch
from support.ranks import RankPool
from support.train import batches, build_engine

from megagamma.distributed.replicas import fingerprint


def drift(arguments: list[str], fault: str) -> str:
    """Train a few steps with a fault planted; returns what the check says, or ""."""
    from megagamma.distributed import engine as engine_module
    from megagamma.distributed.replicas import check_replicas
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
            engine.step()
            if fault == "bit" and step == 2 and engine.runtime.rank == 1:
                down = next(tensor for tensor in engine.map if tensor.name.endswith("2.mlp.linear_fc2.weight"))
                down.parameter.data.view(torch.int32)[3, 5] ^= 1
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
