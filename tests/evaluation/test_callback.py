"""Benchmarks during training: recorded, without a trace in the run, and never its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import make_mirror, write_own_task
from support.processes import attempt, metrics
from support.ranks import RankPool
from support.train import run_trainer

from megagamma.checkpoint.inspection import difference


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own tasks: one that can be scored, one whose split is empty."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, count in (("own", 6), ("own_empty", 0)):
        write_own_task(folder, name, count)
    return folder


def arguments(folder: Path, cache: str, *more: str) -> list[str]:
    return [
        *("--run.folder", str(folder), "--data.cache", cache, "--run.steps", "4", "--validation.interval", "0"),
        *("--optimizer.lr", "0.01", "--data.micro_batch_size", "4", *more),
    ]


def scored(tasks: Path, names: str, *more: str) -> list[str]:
    own = ["--validation.harness_include_path", str(tasks), "--validation.trust_tasks", "true"]
    return ["--validation.harness_tasks", names, *own, *more]


def warnings(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line["text"] for line in lines if line["event"] == "warning"]


def test_recorded_and_without_a_trace(tmp_path: Path, one_rank: RankPool, data_cache: str, tasks: Path) -> None:
    assert one_rank.run(run_trainer, arguments(tmp_path / "without", data_cache)) == [0]
    mirror = make_mirror(tmp_path / "mirror")
    more = scored(
        tasks, "[own, arc_easy, gsm8k:1]",
        *("--validation.harness_interval", "2", "--validation.harness_limit", "3"),
        *("--validation.harness_mirror", str(mirror)),
    )  # fmt: skip
    assert one_rank.run(run_trainer, arguments(tmp_path / "with", data_cache, *more)) == [0]
    lines = metrics(tmp_path / "with")
    names = {key for key in lines[1] if key.startswith("harness/")}
    smooth = ("choice_prob", "choice_prob_norm", "answer_nats_per_byte")
    assert {f"harness/arc_easy/{name}" for name in ("acc", "acc_norm", *smooth)} <= names
    assert {"harness/own/acc", "harness/gsm8k/exact_match", "harness/gsm8k/answer_nats_per_byte"} <= names
    assert [bool(names & set(line)) for line in lines] == [False, True, False, True]
    loss = "harness/arc_easy/answer_nats_per_byte"
    assert lines[1][loss] != lines[3][loss] and 0 < lines[3][loss] < 20
    assert warnings(tmp_path / "with") == []
    # The same run to the bit: losses, weights and moments.
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics(tmp_path / "without")]
    folders = [tmp_path / name / "checkpoints" / "step_00000004" for name in ("with", "without")]
    found = difference(*folders, tolerance=0.0)
    assert found["compared"] > 20 and found["different"] == []


@pytest.mark.parametrize(
    "layout", ["", "--parallel.tensor 2", "--parallel.pipeline 2"], ids=["data", "tensor", "pipeline"]
)
def test_two_ranks(
    tmp_path: Path, one_rank: RankPool, two_ranks: RankPool, data_cache: str, tasks: Path, layout: str
) -> None:
    more = [*scored(tasks, "[own]"), "--run.steps", "1", "--optimizer.lr", "0"]
    assert two_ranks.run(run_trainer, arguments(tmp_path / "two", data_cache, *more, *layout.split())) == [0, 0]
    assert one_rank.run(run_trainer, arguments(tmp_path / "one", data_cache, *more)) == [0]
    two, one = (metrics(tmp_path / name)[-1] for name in ("two", "one"))
    names = [key for key in one if key.startswith("harness/")]
    assert len(names) == 5
    assert [two[name] for name in names] == pytest.approx([one[name] for name in names], abs=1e-4)


def test_a_task_that_fails_only_warns(tmp_path: Path, two_ranks: RankPool, data_cache: str, tasks: Path) -> None:
    more = [*scored(tasks, "[own_empty, own]", "--validation.harness_interval", "2"), "--parallel.tensor", "2"]
    assert two_ranks.run(run_trainer, arguments(tmp_path / "run", data_cache, *more)) == [0, 0]
    found = warnings(tmp_path / "run")
    assert len(found) == 2 and all("own_empty" in text and "the run continues" in text for text in found)
    assert "harness/own/acc" in metrics(tmp_path / "run")[-1]


def run_with_a_failing_rank(arguments: list[str], failing: int, times: int) -> int:
    """A run in which one rank fails the first times that it scores tokens."""
    import os
    from unittest import mock

    from megagamma.distributed.engine import Engine

    whole, left = Engine.run, [times]

    def run(self: Engine, *given: Any, **options: Any) -> Any:
        if options.get("needs") == "logits" and int(os.environ["RANK"]) == failing and left[0] > 0:
            left[0] -= 1
            raise RuntimeError("out of memory, say")
        return whole(self, *given, **options)

    with mock.patch.object(Engine, "run", run):
        return run_trainer(arguments)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_leaves_nobody_waiting(
    tmp_path: Path, two_ranks: RankPool, data_cache: str, tasks: Path, failing: int
) -> None:
    given = arguments(tmp_path / "run", data_cache, *scored(tasks, "[own]", "--validation.harness_interval", "2"))
    assert two_ranks.run(run_with_a_failing_rank, given, failing, 1, seconds=120) == [0, 0]
    lines = metrics(tmp_path / "run")
    assert ["harness/own/acc" in line for line in lines] == [False, False, False, True]
    found = warnings(tmp_path / "run")
    assert len(found) == 1
    assert ("out of memory, say" if failing == 0 else "another rank failed") in found[0]


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        (["--validation.harness_tasks", "[arc_easyy]"], "EvaluationError", ["'arc_easyy'", "arc_easy"]),
        (
            ["--validation.harness_tasks", "[hellaswag]", "--validation.harness_mirror", "MIRROR"],
            "EvaluationError",
            ["Rowan/hellaswag", "fetch_benchmarks.py"],
        ),
        (
            ["--validation.harness_tasks", "[own]", "--validation.harness_mirror", "nowhere"],
            "ConfigurationError",
            ["validation.harness_mirror=nowhere", "no such folder"],
        ),
        (
            ["--validation.harness_interval", "-1"],
            "ConfigurationError",
            ["validation.harness_interval=-1", "at least 0"],
        ),
        (["--validation.harness_limit", "-1"], "ConfigurationError", ["validation.harness_limit=-1", "at least 0"]),
    ],
)
def test_mistakes_are_told_before_the_run(
    tmp_path: Path, two_ranks: RankPool, data_cache: str, more: list[str], kind: str, words: list[str]
) -> None:
    mirror = make_mirror(tmp_path / "mirror")
    given = arguments(tmp_path / "run", data_cache, *[str(mirror) if one == "MIRROR" else one for one in more])
    for found, code, text in two_ranks.run(attempt, given, True):
        assert (found, code) == (kind, 2)
        assert all(word in text for word in words), text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
