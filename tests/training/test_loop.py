"""The loop: which callback is called when, and what a step tells them. All runs are real, on a task of a few symbols."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.processes import metrics
from support.ranks import RankPool
from support.synthetic import train_with

from megagamma.errors import DataError, TrainingError
from megagamma.training.callbacks.base import Callback, Step

LOG: list[Any] = []


class Recorder(Callback):
    """Writes down every call; does what it is told at some steps."""

    def __init__(self, name: str, refuse: int = 0, stop: int = 0, halt: int = 0, fail: str = "") -> None:
        self.name, self.refuse, self.stop, self.halt, self.fail = name, refuse, stop, halt, fail

    def _note(self, call: str, *values: Any) -> None:
        LOG.append((self.name, call, *values))
        if call == self.fail:
            raise DataError(f"{call} fails")

    def begin(self) -> None:
        self._note("begin")

    def before_update(self, step: Step) -> bool:
        self._note("before_update", step.number, step.applied)
        return step.number != self.refuse

    def after_update(self, step: Step) -> None:
        self._note("after_update", step.number, step.applied)

    def after_step(self, step: Step) -> None:
        done = (self.session.step, self.session.consumed)
        self._note("after_step", step.number, (step.samples.start, step.samples.stop), step.is_last, done)
        assert step.seconds > 0 and step.lr > 0
        if step.number == self.stop:
            self.trainer.stop_reason = "a test"
        if step.number == self.halt:
            self.trainer.halt(TrainingError("a test halts"))

    def on_stop(self, reason: str) -> None:
        self._note("on_stop", reason)

    def on_halt(self) -> None:
        self._note("on_halt")

    def end(self) -> None:
        self._note("end")

    def close(self) -> None:
        self._note("close")


def recorded(arguments: list[str], *options: dict[str, Any]) -> tuple[int, str, list[Any]]:
    """Inside a rank: a run with a recorder for each set of options, named a, b, ..."""
    LOG.clear()
    recorders = [Recorder("abc"[number], **given) for number, given in enumerate(options)]
    code, text = train_with(arguments, lambda: list(recorders))
    return code, text, list(LOG)


def run(folder: Path, *more: str) -> list[str]:
    return ["--run.folder", str(folder), "--run.steps", "2", "--validation.at_end", "false", *more]


def test_calls_of_a_whole_run(tmp_path: Path, one_rank: RankPool) -> None:
    code, text, calls = one_rank.run(recorded, run(tmp_path / "run"), {})[0]
    assert (code, text) == (0, "")
    assert [call[1:] for call in calls] == [
        ("begin",),
        ("before_update", 1, False), ("after_update", 1, True), ("after_step", 1, (0, 8), False, (1, 8)),
        ("before_update", 2, False), ("after_update", 2, True), ("after_step", 2, (8, 16), True, (2, 16)),
        ("end",), ("close",),
    ]  # fmt: skip
    # Done: nothing is called but what lets go.
    code, text, calls = one_rank.run(recorded, run(tmp_path / "run"), {})[0]
    assert (code, text, calls) == (0, "", [("a", "close")])


def test_all_are_asked_also_after_a_no(tmp_path: Path, one_rank: RankPool) -> None:
    code, _, calls = one_rank.run(recorded, run(tmp_path / "run"), {"refuse": 1}, {}, {"refuse": 2})[0]
    assert code == 0
    asked = [(name, number) for name, call, number, *_ in (c for c in calls if len(c) > 2) if call == "before_update"]
    assert asked == [(name, number) for number in (1, 2) for name in "abc"]
    assert {call[-1] for call in calls if call[1] == "after_update"} == {False}
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    # What a callback leaves out is no gradient that is not finite, for which the run would end.
    assert '"nan"' not in (tmp_path / "run" / "events.jsonl").read_text()


def test_an_update_that_is_refused_leaves_the_weights(tmp_path: Path, one_rank: RankPool) -> None:
    """The loss of step 2 without the update of step 1 is another one than with it."""
    losses = {}
    for name, refuse in (("kept", 1), ("learned", 0), ("later", 2)):
        given = run(tmp_path / name, "--optimizer.lr", "0.1")
        assert one_rank.run(recorded, given, {"refuse": refuse})[0][0] == 0
        losses[name] = [line["loss"] for line in metrics(tmp_path / name)]
    assert losses["kept"][0] == losses["learned"][0] == losses["later"][0]
    assert losses["learned"][1] == losses["later"][1] != losses["kept"][1]


def test_calls_of_a_run_that_stops(tmp_path: Path, one_rank: RankPool) -> None:
    """The order of the list, and to close the other way round; what comes after in the same step still runs."""
    code, text, calls = one_rank.run(recorded, run(tmp_path / "run"), {"stop": 1}, {})[0]
    assert (code, text) == (75, "")
    assert [call[:2] for call in calls[-6:]] == [
        ("a", "after_step"), ("b", "after_step"), ("a", "on_stop"), ("b", "on_stop"), ("b", "close"), ("a", "close"),
    ]  # fmt: skip
    assert calls[-4][2] == "a test"
    assert not [call for call in calls if call[1] == "end"]


def test_calls_of_a_run_that_halts(tmp_path: Path, one_rank: RankPool) -> None:
    code, text, calls = one_rank.run(recorded, run(tmp_path / "run"), {"halt": 1}, {})[0]
    assert (code, text) == (3, "a test halts")
    assert [call[:2] for call in calls[-5:]] == [
        ("a", "after_step"), ("a", "on_halt"), ("b", "on_halt"), ("b", "close"), ("a", "close"),
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["begin", "before_update", "after_update", "after_step", "end"])
def test_close_is_always_called(tmp_path: Path, one_rank: RankPool, place: str) -> None:
    code, text, calls = one_rank.run(recorded, run(tmp_path / "run"), {}, {"fail": place})[0]
    assert (code, text) == (2, f"{place} fails")
    assert [call[:2] for call in calls[-2:]] == [("b", "close"), ("a", "close")]
    assert not [call for call in calls if call[1] in ("on_halt", "on_stop")], "an error of this rank alone"
