"""The schedule against its formulas, written out anew."""

from __future__ import annotations

import itertools
import math

import pytest

from megagamma.config.schema import Config, DataConfig, RunConfig, ScheduleConfig
from megagamma.data.schedule import batch_size, samples_before, total_steps
from megagamma.training.schedule import learning_rate, warmup_steps

PEAK, STEPS, WARM = 2.0, 110, 10


def rate(step: int, steps: int = STEPS, **options: object) -> float:
    schedule = ScheduleConfig(**{"warmup_steps": WARM, "min_lr_ratio": 0.1, "decay_ratio": 0.2, **options})
    return learning_rate(schedule, PEAK, step, steps)


# 110 steps, of which 10 warm up: step 60 is the middle of the rest, 35 and 85 its quarters. wsd decays in 22 steps.
EXPECTED = {
    "cosine": {35: 0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2, 60: 1.1, 85: 0.2 + 1.8 * (1 - math.sqrt(0.5)) / 2, 110: 0.2},
    "linear": {35: 1.55, 60: 1.1, 85: 0.65, 110: 0.2},
    "wsd": {35: 2.0, 60: 2.0, 88: 2.0, 99: 1.1, 110: 0.2},
    "constant": {35: 2.0, 60: 2.0, 110: 2.0},
}


@pytest.mark.parametrize("shape", EXPECTED)
def test_closed_form(shape: str) -> None:
    for step, wanted in EXPECTED[shape].items():
        assert rate(step, shape=shape) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("shape", EXPECTED)
def test_warm_up_and_its_end(shape: str) -> None:
    # From the first step on there is a rate: step 1 has 1/10 of the peak, not 0.
    assert [rate(step, shape=shape) for step in range(1, WARM + 1)] == pytest.approx(
        [0.2 * step for step in range(1, WARM + 1)]
    )
    after = rate(WARM + 1, shape=shape)
    assert after <= PEAK
    assert after == pytest.approx(PEAK, rel=0.02), "no jump where the warm-up ends"


@pytest.mark.parametrize("shape", EXPECTED)
def test_never_rises_after_the_warm_up_nor_leaves_its_bounds(shape: str) -> None:
    rates = [rate(step, shape=shape) for step in range(WARM, STEPS + 1)]
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert min(rates) >= PEAK * 0.1 - 1e-12
    assert max(rates) == PEAK
    # Past the end, as when a run is resumed with fewer steps, the floor holds.
    if shape != "constant":
        assert rate(STEPS + 50, shape=shape) == pytest.approx(0.2)


def test_warm_up_ratio_rounds_up_and_steps_win() -> None:
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.03), 1000) == 30
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.03), 10) == 1
    assert warmup_steps(ScheduleConfig(warmup_ratio=0.5, warmup_steps=3), 10) == 3
    assert warmup_steps(ScheduleConfig(warmup_steps=30), 10) == 10
    assert rate(1, warmup_steps=0) < PEAK  # cosine: its first step is already down the curve
    assert rate(1, warmup_steps=0, shape="constant") == PEAK


@pytest.mark.parametrize("shape", EXPECTED)
def test_run_of_one_step(shape: str) -> None:
    for warm in (0, 1):
        assert math.isfinite(rate(1, steps=1, shape=shape, warmup_steps=warm))


RAMPS = [[2, 2, 100], [4, 4, 64], [8, 8, 50], [16, 4, 200], [2, 2, 7], [16, 16, 10]]


@pytest.mark.parametrize("ramp", RAMPS, ids=str)
def test_ramp_sums_agree(ramp: list[int]) -> None:
    data = DataConfig(global_batch_size=16, batch_ramp=ramp)
    consumed, sizes = 0, []
    for step in range(120):
        assert samples_before(data, step) == consumed
        sizes.append(batch_size(data, consumed))
        consumed += sizes[-1]
    assert sizes[0] == ramp[0]
    assert sizes[-1] == 16
    assert all(b - a in range(0, 16, ramp[1]) for a, b in itertools.pairwise(sizes))


def test_ramp_has_equal_shares() -> None:
    """[2, 2, 80] up to 8 has the four sizes 2, 4, 6 and 8, each for a third of the way before the last."""
    data = DataConfig(global_batch_size=8, batch_ramp=[2, 2, 80])
    assert [batch_size(data, consumed) for consumed in (0, 19, 20, 39, 40, 59, 60, 79, 80, 10**9)] == [
        2, 2, 4, 4, 6, 6, 8, 8, 8, 8,
    ]  # fmt: skip


def test_no_ramp() -> None:
    data = DataConfig(global_batch_size=16)
    assert batch_size(data, 0) == batch_size(data, 10**9) == 16
    assert samples_before(data, 7) == 112


@pytest.mark.parametrize("ramp", [None, *RAMPS], ids=str)
@pytest.mark.parametrize("tokens", [1, 32, 33, 512, 513, 5000, 100_000])
def test_token_budget_is_met_by_the_fewest_steps(ramp: list[int] | None, tokens: int) -> None:
    data = DataConfig(sequence_length=32, global_batch_size=16, batch_ramp=ramp)
    steps = total_steps(Config(run=RunConfig(tokens=tokens), data=data))
    assert samples_before(data, steps) * 32 >= tokens
    assert samples_before(data, steps - 1) * 32 < tokens


def test_steps_are_taken_as_they_are() -> None:
    assert total_steps(Config(run=RunConfig(steps=12))) == 12
    # 1e9 tokens of 4096 x 16 a step.
    data = DataConfig(sequence_length=4096, global_batch_size=16)
    assert total_steps(Config(run=RunConfig(tokens=1e9), data=data)) == 15259
