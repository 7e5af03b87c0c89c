"""Every ZeRO stage is the same mathematics."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.memory import measure_build
from support.ranks import RankPool
from support.train import train_steps

STEPS = 10


@pytest.fixture(scope="module")
def reference(two_ranks: RankPool, data_cache: str) -> list[tuple[float, float]]:
    """ZeRO 0 on two ranks."""
    return two_ranks.run(train_steps, arguments(data_cache, 0), STEPS)[0]


def arguments(data_cache: str, stage: int | str) -> list[str]:
    return ["--data.cache", data_cache, "--deepspeed_config", f"configs/deepspeed/zero{stage}.json"]


# Offload keeps the optimizer's state in the CPU's memory: the same path as on a GPU, though here there is nowhere else.
@pytest.mark.parametrize("stage", [1, 2, 3, "2_offload", "3_offload"])
def test_stages_agree_on_two_ranks(
    two_ranks: RankPool, data_cache: str, reference: list[tuple[float, float]], stage: int | str
) -> None:
    found = two_ranks.run(train_steps, arguments(data_cache, stage), STEPS)
    assert found[0] == found[1]
    for (loss, norm), (loss0, norm0) in zip(found[0], reference, strict=True):
        assert loss == pytest.approx(loss0, rel=1e-5)
        assert norm == pytest.approx(norm0, rel=1e-5)
    # Negative control: training moves the loss by far more than the tolerance.
    assert reference[0][0] - reference[-1][0] > 0.5


def test_two_ranks_are_one(
    two_ranks: RankPool, one_rank: RankPool, data_cache: str, reference: list[tuple[float, float]]
) -> None:
    found = one_rank.run(train_steps, arguments(data_cache, 0), STEPS)[0]
    for (loss, norm), (loss0, norm0) in zip(found, reference, strict=True):
        assert loss == pytest.approx(loss0, rel=1e-5)
        assert norm == pytest.approx(norm0, rel=1e-5)
    other = one_rank.run(train_steps, [*arguments(data_cache, 0), "--run.seed", "7"], 2)[0]
    assert abs(other[0][0] - found[0][0]) > 1e-4


@pytest.mark.ranks
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_a_model_is_never_whole_while_zero_3_builds_it() -> None:
    """Each rank holds its half, the module that is being made, and what gathering and drawing it takes."""
    arguments = [
        *("--model.vocab_size", "1024", "--model.hidden_size", "512", "--model.num_layers", "20"),
        *("--model.ffn_hidden_size", "1024", "--deepspeed_config", "configs/deepspeed/zero3.json"),
    ]
    pool = RankPool(2)
    try:
        spread, whole = pool.run(measure_build, arguments, True), pool.run(measure_build, arguments, False)
    finally:
        pool.close()
    for found in spread:
        assert found["peak"] < 0.5 * found["whole"] + 10 * found["largest"] < 0.75 * found["whole"], found
    # Negative control: whole, as without it.
    for found in whole:
        assert found["peak"] > 0.95 * found["whole"], found
