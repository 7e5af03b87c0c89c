"""A save in which anything fails publishes nothing, and is heard of on all ranks. The faults are raised where the disk is
written, in real runs."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.ranks import RankPool
from support.synthetic import train_with

from megagamma.checkpoint.reader import read_manifest, steps_saved, verify_all
from megagamma.checkpoint.safetensors_writer import ShardWriter


def train_with_faults(arguments: list[str], saves: list[int], error: str, place: str, rank: int) -> tuple[int, str]:
    """Inside a rank: a run in which one rank's saves of these steps fail."""
    import os

    errors: dict[str, BaseException] = {
        "value": ValueError("a fault"), "memory": MemoryError(), "exit": SystemExit(3), "disk": OSError(28, "No space left"),
    }  # fmt: skip
    original = getattr(ShardWriter, place)

    def faulty(self: Any, *given: Any) -> Any:
        path = given[0] if place == "__init__" else self.path
        step = int(path.parent.name.removeprefix(".step_").removesuffix(".partial"))
        # At the end of the last file: those before it are complete.
        due = place != "close" or path.name.startswith("exp_avg_sq")
        if due and step in saves and int(os.environ["RANK"]) == rank:
            raise errors[error]
        return original(self, *given)

    with mock.patch.object(ShardWriter, place, faulty):
        result = train_with(arguments, list)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save-")]
    return result


def slow(*cases: tuple[str, str]) -> list[Any]:
    """Parameters of tests that only `make test-all` runs."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def run(folder: Path, *more: str) -> list[str]:
    rules = ("--checkpoint.interval", "2", "--checkpoint.keep_last", "1", "--checkpoint.asynchronous", "true")
    return ["--run.folder", str(folder), "--run.steps", "9", "--validation.at_end", "false", *rules, *more]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def assert_valid(folder: Path, steps: list[int]) -> None:
    root = folder / "checkpoints"
    assert steps_saved(root) == steps
    for step in steps:
        checkpoint = root / f"step_{step:08d}"
        verify_all(checkpoint, read_manifest(checkpoint))
    assert not list(root.glob(".*"))


@pytest.mark.parametrize(
    ("error", "place"), [("exit", "close"), *slow(("value", "write"), ("memory", "__init__"), ("disk", "close"))]
)
def test_a_failed_asynchronous_save_is_reported_and_training_continues(
    tmp_path: Path, one_rank: RankPool, error: str, place: str
) -> None:
    folder = tmp_path / "run"
    assert one_rank.run(train_with_faults, run(folder), [4], error, place, 0) == [(0, "")]
    assert_valid(folder, [9])
    assert [event["folder"] for event in events(folder, "checkpoint")] == [
        f"step_{step:08d}" for step in (2, 6, 8, 9)
    ], "each is pruned by the next one that is valid"
    (event,) = events(folder, "checkpoint_failed")
    assert "checkpoint of step 4" in event["problem"] and "rank 0: cannot be written" in event["problem"]
    assert any("training continues" in event["text"] for event in events(folder, "warning"))


def test_the_second_failure_in_a_row_ends_the_run(tmp_path: Path, one_rank: RankPool) -> None:
    folder = tmp_path / "run"
    ((code, text),) = one_rank.run(train_with_faults, run(folder), [4, 6], "value", "write", 0)
    assert code == 2 and "2 saves in a row failed, the last one: checkpoint of step 6" in text
    assert_valid(folder, [2])
    # Two that are not in a row do not.
    folder = tmp_path / "other"
    assert one_rank.run(train_with_faults, run(folder), [2, 6], "value", "write", 0) == [(0, "")]
    assert len(events(folder, "checkpoint_failed")) == 2


def test_the_last_save_of_a_run_is_not_lost_without_a_word(tmp_path: Path, one_rank: RankPool) -> None:
    late = run(tmp_path / "run", "--checkpoint.at_end", "false")
    ((code, text),) = one_rank.run(train_with_faults, late, [8], "value", "write", 0)
    assert code == 2 and "the last save of the run failed: checkpoint of step 8" in text
    assert_valid(tmp_path / "run", [6])


@pytest.mark.parametrize(
    ("error", "asynchronous"), [("value", "true"), ("memory", "false"), *slow(("memory", "true"), ("value", "false"))]
)
def test_all_ranks_hear_of_it(tmp_path: Path, two_ranks: RankPool, error: str, asynchronous: str) -> None:
    folder = tmp_path / "run"
    given = run(folder, "--checkpoint.asynchronous", asynchronous)
    results = two_ranks.run(train_with_faults, given, [4, 6], error, "write", 1)
    assert [code for code, _ in results] == [2, 2]
    for _, text in results:
        assert (
            f"checkpoint of step {6 if asynchronous == 'true' else 4}" in text and "rank 1: cannot be written" in text
        )
    assert_valid(folder, [2])


def test_what_is_not_the_whole_model_is_not_published(tmp_path: Path, one_rank: RankPool) -> None:
    folder = tmp_path / "run"
    ((code, text),) = one_rank.run(train_with_a_tensor_left_out, run(folder, "--checkpoint.asynchronous", "false"))
    assert code == 2 and "weights are listed, where its config describes a model of" in text
    assert_valid(folder, [])


def train_with_a_tensor_left_out(arguments: list[str]) -> tuple[int, str]:
    """Inside a rank: a run whose map forgets a tensor when it is asked who writes what."""
    from megagamma.checkpoint import saver

    original = saver._work_units
    with mock.patch.object(saver, "_work_units", lambda engine: original(engine)[:-1]):
        return train_with(arguments, list)
