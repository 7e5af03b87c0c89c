"""Which steps are saved, which are kept, and what a checkpoint carries for the callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankPool
from support.synthetic import train_with

from megagamma.checkpoint.reader import read_manifest, steps_saved
from megagamma.config.schema import CheckpointConfig
from megagamma.training.callbacks.base import Callback, Step
from megagamma.training.callbacks.checkpointing import Checkpointing


@pytest.mark.parametrize(
    ("rules", "permanent"),
    [
        ({}, []),
        ({"permanent": [3, 10]}, [3, 10]),
        ({"log_spaced": True}, [1, 2, 4, 8, 16]),
        ({"save_initial": True}, [0]),
        ({"log_spaced": True, "permanent": [5], "save_initial": True}, [0, 1, 2, 4, 5, 8, 16]),
    ],
)
def test_permanent_steps(rules: dict[str, Any], permanent: list[int]) -> None:
    callback = Checkpointing(CheckpointConfig(**rules))
    assert [step for step in range(17) if callback.is_permanent(step)] == permanent


class Stop(Callback):
    """Asks to leave after a step, as a signal does."""

    def __init__(self, number: int) -> None:
        self.number = number

    def after_step(self, step: Step) -> None:
        if step.number == self.number:
            self.trainer.stop_reason = "a test"


class Count(Callback):
    """Keeps a number in checkpoints."""

    state_key = "counted"
    seen: list[int] = []

    def __init__(self) -> None:
        self.count = 0

    def state(self) -> int:
        return self.count

    def load_state(self, state: Any) -> None:
        self.count = state

    def after_step(self, step: Step) -> None:
        self.count += 1
        Count.seen.append(self.count)


def run(folder: Path, *more: str) -> list[str]:
    return ["--run.folder", str(folder), "--run.steps", "9", "--validation.at_end", "false", *more]


def train(arguments: list[str], stop_at: int = 0) -> tuple[int, list[int]]:
    """Inside a rank: a run that may be asked to stop; its exit code and what `Count` counted."""
    Count.seen = []
    code, text = train_with(arguments, lambda: [Stop(stop_at), Count()], first=True)
    assert not text, text
    return code, Count.seen


@pytest.mark.parametrize(
    ("rules", "saved"),
    [
        ("", [9]),
        ("--checkpoint.at_end false", []),
        ("--checkpoint.interval 4 --checkpoint.at_end false", [4, 8]),
        ("--checkpoint.interval 2 --checkpoint.keep_last 2", [8, 9]),
        ("--checkpoint.interval 2 --checkpoint.keep_last 0", [2, 4, 6, 8, 9]),
        ("--checkpoint.interval 3 --checkpoint.keep_last 1 --checkpoint.permanent [2,3]", [2, 3, 9]),
        ("--checkpoint.keep_last 1 --checkpoint.log_spaced true --checkpoint.save_initial true", [0, 1, 2, 4, 8, 9]),
        ("--checkpoint.interval 2 --checkpoint.keep_last 1 --checkpoint.asynchronous true", [9]),
    ],
)
def test_saved_steps(tmp_path: Path, one_rank: RankPool, rules: str, saved: list[int]) -> None:
    assert one_rank.run(train, run(tmp_path / "run", *rules.split())) == [(0, list(range(1, 10)))]
    assert steps_saved(tmp_path / "run" / "checkpoints") == saved


def test_a_run_that_stops_saves_and_resumes_with_its_callbacks_state(tmp_path: Path, one_rank: RankPool) -> None:
    given = run(tmp_path / "run", "--checkpoint.interval", "2", "--checkpoint.keep_last", "0")
    assert one_rank.run(train, given, 5) == [(75, [1, 2, 3, 4, 5])]
    root = tmp_path / "run" / "checkpoints"
    assert steps_saved(root) == [2, 4, 5]
    progress = read_manifest(root / "step_00000005")["progress"]
    assert progress["counted"] == 5
    assert len(progress["recent_losses"]["losses"]) == 5, "of the guard"
    assert one_rank.run(train, given) == [(0, [6, 7, 8, 9])]
    assert read_manifest(root / "step_00000009")["progress"]["counted"] == 9
