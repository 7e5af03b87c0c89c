"""When held-out data are measured, and how many samples of a set."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import metrics
from support.ranks import RankPool
from support.synthetic import CopyTask, train_copy_task


def answers(folder: Path, one_rank: RankPool, rules: str) -> tuple[dict[int, float], dict[int, float]]:
    """Of a run of 5 steps, the answers measured by step: of the samples that are asked for, and of the full set."""
    given = ["--run.folder", str(folder), "--run.steps", "5", "--checkpoint.at_end", "false", *rules.split()]
    assert one_rank.run(train_copy_task, given) == [0]
    found: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for line in metrics(folder):
        for place, name in zip(found, ("copy", "copy_full"), strict=True):
            if f"val/{name}/answers" in line:
                place[line["step"]] = line[f"val/{name}/answers"]
    return found


# A sample has 8 answers, the set 40 samples.
ALL = 8.0 * CopyTask.size


@pytest.mark.parametrize(
    ("rules", "measured", "full"),
    [
        ("--validation.interval 2 --validation.windows 0", {2: ALL, 4: ALL, 5: ALL}, {}),
        ("--validation.interval 2 --validation.windows 0 --validation.at_end false", {2: ALL, 4: ALL}, {}),
        ("--validation.interval 0 --validation.windows 3", {5: 24.0}, {}),
        ("--validation.interval 0 --validation.at_end false", {}, {}),
        # The last step is measured once.
        ("--validation.interval 5 --validation.windows 3 --validation.full_at_end true", {5: 24.0}, {5: ALL}),
        # Microbatches of 4 that neither 5 nor 40 samples fill evenly, and more windows than there are.
        ("--validation.interval 0 --validation.windows 5 --data.micro_batch_size 4", {5: 40.0}, {}),
        ("--validation.interval 0 --validation.windows 39 --data.micro_batch_size 8", {5: 312.0}, {}),
        ("--validation.interval 0 --validation.windows 1000 --data.micro_batch_size 8", {5: ALL}, {}),
    ],
)
def test_measured_steps_and_samples(
    tmp_path: Path, one_rank: RankPool, rules: str, measured: dict[int, float], full: dict[int, float]
) -> None:
    assert answers(tmp_path / "run", one_rank, rules) == (measured, full)


def test_measuring_leaves_no_trace_in_training(tmp_path: Path, one_rank: RankPool) -> None:
    for name, rules in (("with", "--validation.interval 1"), ("without", "--validation.interval 0")):
        answers(tmp_path / name, one_rank, rules)
    left, right = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("with", "without"))
    assert left == right and len(set(left)) == 5
