"""Batches through the model: what the output function gets and gives, on every stage; the gradient is that of the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ranks import RankPool
from support.train import batches, build_engine


def run_batches(arguments: list[str], train: bool) -> dict[str, Any]:
    """Inside a rank: microbatches through the model, and what came of it."""
    config, engine = build_engine(arguments)
    micro = batches(config, engine, 1)
    shapes: list[tuple[int, ...]] = []
    recorded: list[bool] = []

    def objective(output: torch.Tensor, batch: Any) -> torch.Tensor:
        shapes.append(tuple(output.shape))
        recorded.append(output.requires_grad)
        total = (output * batch.loss_mask).sum()
        return total if train else torch.stack((total, batch.loss_mask.sum()))

    values = engine.run(micro, objective, train=train)
    gradients = {
        tensor.parts[0].logical.name: tensor.parameter.grad.clone()
        for tensor in engine.map
        if tensor.parameter.grad is not None
    }
    found = {
        "count": len(micro),
        "values": [value.tolist() for value in values],
        "detached": not any(value.requires_grad for value in values),
        "shapes": shapes,
        "recorded": recorded,
        "gradients": gradients,
        "training": engine.deepspeed.training,
    }
    engine.discard()
    engine.close()
    return found


def gradients_by_hand(arguments: list[str]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Inside a rank: the same by one plain backward pass of the sum."""
    config, engine = build_engine(arguments)
    chunk = engine.chunks[0]
    totals = []
    for batch in batches(config, engine, 1):
        losses = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels)
        totals.append((losses * batch.loss_mask).sum())
    torch.stack(totals).sum().backward()
    gradients = {tensor.parts[0].logical.name: tensor.parameter.grad.clone() for tensor in engine.map}
    engine.close()
    return [float(total) for total in totals], gradients


def given(cache: str, *more: str) -> list[str]:
    zero = ("--deepspeed_config", "configs/deepspeed/zero0.json")
    return ["--data.cache", cache, "--data.micro_batch_size", "2", *zero, *more]


@pytest.fixture(scope="module")
def by_hand(one_rank: RankPool, data_cache: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    return one_rank.run(gradients_by_hand, given(data_cache))[0]


STAGES = ["--parallel.pipeline", "2"]
ONE = pytest.param([], id="1")
TWO = pytest.param(STAGES, id="2", marks=pytest.mark.ranks)
VIRTUAL = pytest.param([*STAGES, "--parallel.virtual_pipeline", "2"], id="2x2", marks=pytest.mark.ranks)


@pytest.mark.parametrize("more", [ONE, TWO, VIRTUAL])
def test_gradient_of_the_sum_over_microbatches(
    one_rank: RankPool, request: pytest.FixtureRequest, data_cache: str, by_hand: Any, more: list[str]
) -> None:
    pool = request.getfixturevalue("two_ranks") if more else one_rank
    ranks = pool.run(run_batches, given(data_cache, *more), True)
    totals, expected = by_hand
    assert ranks[-1]["values"] == pytest.approx(totals, rel=1e-5)
    assert ranks[-1]["detached"] and ranks[-1]["shapes"] == [(2, 64)] * 4 and all(ranks[-1]["recorded"])
    gradients: dict[str, torch.Tensor] = {}
    for rank in ranks:
        gradients |= rank["gradients"]
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        difference = float((gradient - expected[name]).norm() / expected[name].norm())
        assert difference < 1e-5, name
    for rank in ranks[:-1]:
        assert (rank["values"], rank["shapes"]) == ([], []), "only the last stage has outputs"


@pytest.mark.parametrize("more", [ONE, TWO])
def test_evaluation_records_nothing(
    one_rank: RankPool, request: pytest.FixtureRequest, data_cache: str, by_hand: Any, more: list[str]
) -> None:
    pool = request.getfixturevalue("two_ranks") if more else one_rank
    ranks = pool.run(run_batches, given(data_cache, *more), False)
    values = ranks[-1]["values"]
    assert [value[0] for value in values] == pytest.approx(by_hand[0], rel=1e-5)
    assert [value[1] for value in values] == [128.0] * 4
    for rank in ranks:
        assert rank["gradients"] == {} and not any(rank["recorded"])
        assert rank["training"], "the model is back in training mode"
