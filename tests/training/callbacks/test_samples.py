"""When text is sampled from a model in training, and that it is the text of this model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import metrics
from support.ranks import RankPool
from support.train import run_trainer


def samples(folder: Path, one_rank: RankPool, cache: str, *more: str) -> list[dict[str, Any]]:
    given = ["--run.folder", str(folder), "--run.steps", "5", "--data.cache", cache, "--checkpoint.at_end", "false"]
    given += ["--validation.at_end", "false", "--optimizer.lr", "0.02", "--logging.sample_prompt", "The people", *more]
    assert one_rank.run(run_trainer, given) == [0]
    file = folder / "samples.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(("interval", "steps"), [("0", [5]), ("2", [2, 4, 5]), ("5", [5])])
def test_sampled_steps(tmp_path: Path, one_rank: RankPool, data_cache: str, interval: str, steps: list[int]) -> None:
    """After the last step once."""
    found = samples(tmp_path / "run", one_rank, data_cache, "--logging.sample_interval", interval)
    assert [sample["step"] for sample in found] == steps
    assert {sample["prompt"] for sample in found} == {"The people"}
    assert all(sample["text"] for sample in found)


def test_no_tokens_no_sample(tmp_path: Path, one_rank: RankPool, data_cache: str) -> None:
    assert samples(tmp_path / "run", one_rank, data_cache, "--logging.sample_tokens", "0") == []


def test_sampling_leaves_no_trace_in_training(tmp_path: Path, one_rank: RankPool, data_cache: str) -> None:
    often = samples(tmp_path / "often", one_rank, data_cache, "--logging.sample_interval", "1")
    once = samples(tmp_path / "once", one_rank, data_cache)
    assert often[-1] == once[-1]
    left, right = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("often", "once"))
    assert left == right
