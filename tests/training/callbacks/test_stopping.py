"""Leaving a run: by a signal between two steps, or because the folder has another owner."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from support.processes import metrics
from support.ranks import RankPool
from support.synthetic import train_with

from megagamma.checkpoint.reader import steps_saved
from megagamma.training.callbacks.base import Callback, Step


class SendSignal(Callback):
    """Sends this process a signal in a step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def before_update(self, step: Step) -> bool:
        if step.number == self.number:
            os.kill(os.getpid(), signal.SIGUSR1)
        return True


class LoseLock(Callback):
    """Lets the lock be lost in a step, as its thread notices when another process has taken it."""

    def before_update(self, step: Step) -> bool:
        if step.number == 2:
            self.session.lock.lost = "run.folder=x: its lock was taken over by process 7"
        return True


def signalled(arguments: list[str], number: int) -> tuple[int, str, bool]:
    """Inside a rank: whether the signal's handler was given back is the last value."""
    before = signal.getsignal(signal.SIGUSR1)
    code, text = train_with(arguments, lambda: [SendSignal(number)])
    return code, text, signal.getsignal(signal.SIGUSR1) is before


def without_lock(arguments: list[str]) -> tuple[int, str]:
    return train_with(arguments, lambda: [LoseLock()])


class MoveFolder(Callback):
    """Does something to the run's folder in its second step, as somebody at another terminal may."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def before_update(self, step: Step) -> bool:
        folder = self.session.folder.path
        if step.number == 2 and self.session.runtime.is_main:
            if self.fault == "deleted":
                shutil.rmtree(folder)
            else:
                folder.rename(folder.with_name("elsewhere"))
            if self.fault == "renamed and made anew":
                folder.mkdir()
        return True


def in_moved_folder(arguments: list[str], fault: str) -> tuple[int, str]:
    return train_with(arguments, lambda: [MoveFolder(fault)])


@pytest.mark.parametrize(
    "fault",
    ["renamed", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("deleted", "renamed and made anew"))],
)
def test_a_folder_that_is_moved_or_deleted_ends_the_run_on_all_ranks(
    tmp_path: Path, two_ranks: RankPool, fault: str
) -> None:
    folder = tmp_path / "run"
    found = two_ranks.run(in_moved_folder, [*run(folder), "--checkpoint.interval", "1"], fault)
    assert [code for code, _ in found] == [2, 2]
    assert (
        "the folder was deleted or renamed while the run trained in it; this process writes nothing more" in found[0][1]
    )
    # Nothing was written under the name after that, and what was there before is whole.
    assert not folder.exists() or not list(folder.iterdir())
    if fault != "deleted":
        assert [line["step"] for line in metrics(tmp_path / "elsewhere")] == [1]
        assert steps_saved(tmp_path / "elsewhere" / "checkpoints") == [1]


def run(folder: Path) -> list[str]:
    return ["--run.folder", str(folder), "--run.steps", "4", "--validation.at_end", "false"]


@pytest.mark.parametrize(("number", "code", "reached"), [(1, 75, 1), (3, 75, 3), (4, 0, 4)])
def test_a_signal_ends_the_run_after_its_step(
    tmp_path: Path, one_rank: RankPool, number: int, code: int, reached: int
) -> None:
    """In the last step it comes too late: the run is done."""
    assert one_rank.run(signalled, run(tmp_path / "run"), number) == [(code, "", True)]
    assert steps_saved(tmp_path / "run" / "checkpoints") == [reached]
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, reached + 1))
    said = (tmp_path / "run" / "events.jsonl").read_text()
    assert ('"signal": "SIGUSR1"' in said) is (code == 75)


def test_a_run_whose_folder_was_taken_writes_nothing_more(tmp_path: Path, one_rank: RankPool) -> None:
    code, text = one_rank.run(without_lock, run(tmp_path / "run"))[0]
    assert code == 2
    assert "its lock was taken over by process 7; this process writes nothing more" in text
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert steps_saved(tmp_path / "run" / "checkpoints") == []
