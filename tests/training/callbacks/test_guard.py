"""The guard: what it calls a spike, what it leaves out, and when enough is enough. Its runs are real."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.processes import metrics
from support.ranks import RankPool
from support.synthetic import train_with

from megagamma.config.schema import GuardConfig
from megagamma.training.callbacks.base import Callback, Step
from megagamma.training.callbacks.guard import LossGuard


def guard(**options: Any) -> LossGuard:
    return LossGuard(GuardConfig(**{"spike_window": 4, "spike_sigma": 3.0, **options}))


def test_a_spike_is_a_loss_far_above_the_last_ones() -> None:
    watch = guard()
    assert [watch.check(loss) for loss in (1.0, 2.0, 1.0, 2.0)] == ["ok"] * 4
    # Mean 1.5, standard deviation sqrt(1/3).
    limit = 1.5 + 3 * math.sqrt(1 / 3)
    assert watch.check(limit + 1e-6) == "spike"
    assert list(watch.recent) == [1.0, 2.0, 1.0, 2.0], "a spike does not join what the next ones are compared with"
    assert watch.check(limit - 1e-6) == "ok"
    assert list(watch.recent) == [2.0, 1.0, 2.0, limit - 1e-6]
    assert watch.check(-50.0) == "ok", "far below is no spike"


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    watch = guard()
    assert [watch.check(loss) for loss in (1.0, 1.0, 100.0)] == ["ok"] * 3


def test_equal_losses_leave_room_for_rounding() -> None:
    watch = guard()
    for _ in range(4):
        watch.check(10.0)
    # At least a thousandth of the mean stands for the deviation.
    assert watch.check(10.029) == "ok"
    watch = guard()
    for _ in range(4):
        watch.check(10.0)
    assert watch.check(10.031) == "spike"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_nan_at_once(loss: float) -> None:
    watch = guard()
    assert watch.check(loss) == "nan"
    assert not watch.recent


def test_policies() -> None:
    assert guard(on_nan="stop", on_spike="report").policy("nan") == "stop"
    assert guard(on_nan="stop", on_spike="report").policy("spike") == "report"
    watch = guard(on_nan="skip", on_spike="skip", max_skips=2)
    assert [watch.policy(status) for status in ("nan", "spike", "nan")] == ["skip", "skip", "stop"]
    assert guard(on_nan="skip", max_skips=0).policy("nan") == "stop"


def test_state_goes_into_a_checkpoint_and_comes_back() -> None:
    watch, resumed = guard(), guard()
    for loss in (5.0, 4.0, 3.0, 2.0, 1.0):
        watch.check(loss)
    resumed.load_state(json.loads(json.dumps(watch.state())))
    assert list(resumed.recent) == [4.0, 3.0, 2.0, 1.0]
    assert resumed.check(9.0) == "spike"


# -- in real runs --------------------------------------------------------------------------------------------------


class Poison(Callback):
    """Before some updates, makes the gradient or the loss something that is not finite, or the loss large."""

    def __init__(self, gradients: tuple[int, ...], losses: tuple[int, ...], spikes: tuple[int, ...]) -> None:
        self.gradients, self.losses, self.spikes = gradients, losses, spikes

    def before_update(self, step: Step) -> bool:
        if step.number in self.gradients:
            next(iter(self.engine.map)).parameter.grad.view(-1)[0] = math.nan
        if step.number in self.losses:
            step.loss = math.nan
        if step.number in self.spikes:
            step.loss = 100.0
        return True


class Weights(Callback):
    """Remembers a number for the weights after each step, also of one that ended the run."""

    sums: list[float]

    def __init__(self) -> None:
        Weights.sums = []

    def _note(self) -> None:
        Weights.sums.append(sum(float(tensor.parameter.double().square().sum()) for tensor in self.engine.map))

    def after_step(self, step: Step) -> None:
        self._note()

    def on_halt(self) -> None:
        self._note()


def poisoned(
    arguments: list[str],
    gradients: tuple[int, ...] = (),
    losses: tuple[int, ...] = (),
    spikes: tuple[int, ...] = (),
) -> tuple[int, str, list[float]]:
    """Inside a rank: a run, its exit code, its error, and the weights' numbers."""
    code, text = train_with(arguments, lambda: [Poison(gradients, losses, spikes), Weights()], first=True)
    return code, text, Weights.sums


def run(folder: Path, *more: str) -> list[str]:
    zero = ("--deepspeed_config", "configs/deepspeed/zero0.json")
    return ["--run.folder", str(folder), "--run.steps", "6", "--validation.at_end", "false", *zero, *more]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_by_default_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, one_rank: RankPool) -> None:
    code, text, weights = one_rank.run(poisoned, run(tmp_path / "run"), (), (3,))[0]
    assert code == 3
    assert "loss or gradient that is not finite at step 3, samples 16 to 23" in text
    assert "the weights are those of step 2" in text and "--guard.on_nan skip" in text
    assert len(weights) == 3 and weights[2] == weights[1] != weights[0]
    (event,) = events(tmp_path / "run", "nan")
    assert (event["step"], event["loss"], event["samples"], event["policy"]) == (3, None, [16, 24], "stop")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_a_gradient_that_is_not_finite_ends_the_run_too(tmp_path: Path, one_rank: RankPool) -> None:
    code, text, weights = one_rank.run(poisoned, run(tmp_path / "run"), (3,))[0]
    assert code == 3 and "gradient norm nan, policy stop: the weights are those of step 2" in text
    assert weights[2] == weights[1] != weights[0]
    assert math.isfinite(events(tmp_path / "run", "nan")[0]["loss"])


def test_a_step_that_is_left_out_changes_nothing_and_counts(tmp_path: Path, one_rank: RankPool) -> None:
    skip = ("--guard.on_nan", "skip")
    code, text, weights = one_rank.run(poisoned, run(tmp_path / "run", *skip), (3,), (5,))[0]
    assert (code, text) == (0, "")
    assert weights[2] == weights[1] and weights[4] == weights[3]
    assert len(set(weights)) == 4
    # Their samples are not seen again.
    assert [line["samples"] for line in metrics(tmp_path / "run")] == [8, 16, 24, 32, 40, 48]
    assert [event["step"] for event in events(tmp_path / "run", "nan")] == [3, 5]


@pytest.mark.parametrize(
    ("gradients", "losses", "last"),
    [((2, 3, 4), (), 4), ((), (2, 3, 4), 4), ((2, 4), (3,), 4), ((3,), (2, 4), 4), ((1, 2, 4, 5, 6), (), 6)],
)
def test_skips_of_either_kind_in_a_row_end_the_run(
    tmp_path: Path, one_rank: RankPool, gradients: tuple[int, ...], losses: tuple[int, ...], last: int
) -> None:
    skip = ("--guard.on_nan", "skip", "--guard.max_skips", "2")
    code, text, _ = one_rank.run(poisoned, run(tmp_path / "run", *skip), gradients, losses)[0]
    assert code == 3 and f"at step {last}," in text
    policies = [event["policy"] for event in events(tmp_path / "run", "nan")]
    assert policies == ["skip"] * (len(gradients) + len(losses) - 1) + ["stop"]


def test_an_update_that_is_made_begins_the_count_anew(tmp_path: Path, one_rank: RankPool) -> None:
    skip = ("--guard.on_nan", "skip", "--guard.max_skips", "2")
    code, text, weights = one_rank.run(poisoned, run(tmp_path / "run", *skip), (1, 4), (2, 5))[0]
    assert (code, text) == (0, "")
    assert len(events(tmp_path / "run", "nan")) == 4
    assert weights[1] == weights[0] and weights[2] != weights[1]


@pytest.mark.parametrize(("policy", "code"), [("report", 0), ("skip", 0), ("stop", 3)])
def test_a_spike(tmp_path: Path, one_rank: RankPool, policy: str, code: int) -> None:
    more = ("--guard.on_spike", policy, "--guard.spike_window", "3")
    found, text, weights = one_rank.run(poisoned, run(tmp_path / "run", *more), (), (), (5,))[0]
    assert found == code, text
    (event,) = events(tmp_path / "run", "spike")
    assert (event["step"], event["loss"], event["policy"]) == (5, 100.0, policy)
    # Only what is reported is also learned from.
    assert (weights[4] == weights[3]) is (policy != "report")


def test_a_spike_whose_gradient_is_not_finite_is_reported_as_both(tmp_path: Path, one_rank: RankPool) -> None:
    more = ("--guard.spike_window", "3")
    code, text, _ = one_rank.run(poisoned, run(tmp_path / "run", *more), (5,), (), (5,))[0]
    assert code == 3 and "gradient norm nan" in text
    assert [event["step"] for kind in ("spike", "nan") for event in events(tmp_path / "run", kind)] == [5, 5]
