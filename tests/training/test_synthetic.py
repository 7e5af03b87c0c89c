"""Data that are no text train through the same loop: a source, an evaluation set with scores of its own, no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankPool
from support.synthetic import train_copy_task


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_synthetic_task_trains_on_any_layout(tmp_path: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    common = ["--run.steps", "6", "--validation.interval", "3"]
    runs = {
        "one": (one_rank, []),
        "data": (two_ranks, []),
        "tensor": (two_ranks, ["--parallel.tensor", "2"]),
        "pipeline": (two_ranks, ["--parallel.pipeline", "2"]),
    }
    for name, (pool, more) in runs.items():
        assert set(pool.run(train_copy_task, [*common, "--run.folder", str(tmp_path / name), *more])) == {0}
    expected = lines(tmp_path / "one")
    assert "val/copy/accuracy" in expected[2] and "val/copy/bits_per_byte" not in expected[2]
    assert 0 <= expected[-1]["val/copy/accuracy"] < 0.5
    for name in ("data", "tensor", "pipeline"):
        for mine, other in zip(lines(tmp_path / name), expected, strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert lines(tmp_path / name)[-1]["val/copy/loss"] == pytest.approx(expected[-1]["val/copy/loss"], rel=1e-5)
    # What belongs to text is left out.
    assert not (tmp_path / "one" / "tokenizer.model").exists()
    assert not (tmp_path / "one" / "samples.jsonl").exists()


def test_it_resumes(tmp_path: Path, one_rank: RankPool) -> None:
    common = ["--schedule.shape", "constant", "--run.folder", str(tmp_path / "run")]
    assert one_rank.run(train_copy_task, [*common, "--run.steps", "2"]) == [0]
    assert one_rank.run(train_copy_task, [*common, "--run.steps", "4"]) == [0]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
