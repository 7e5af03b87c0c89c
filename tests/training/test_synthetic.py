"""Data that are no text train through the same loop: a source, an evaluation set with scores of its own, no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.ranks import RankPool
from torch import Tensor

from megagamma.data.contracts import Batch

LENGTH, SYMBOLS = 16, 64


class CopyTask:
    """The second half of a sequence repeats the first; only the second half counts. Sample i is a function of i alone."""

    size = 40
    needs: Literal["loss", "token_scores"] = "token_scores"
    sums: tuple[str, ...] = ("nats", "answers", "right")

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def batch(self, ids: Sequence[int]) -> Batch:
        half = LENGTH // 2 + 1
        rows = []
        for index in ids:
            generator = torch.Generator().manual_seed(self.first + index)
            symbols = torch.randint(0, SYMBOLS, (half,), generator=generator)
            rows.append(torch.cat((symbols, symbols))[: LENGTH + 1])
        tokens = torch.stack(rows)
        mask = torch.zeros(len(ids), LENGTH)
        mask[:, half - 1 :] = 1.0
        mask[[row for row, index in enumerate(ids) if self.first and index >= self.size]] = 0.0
        positions = torch.arange(LENGTH).repeat(len(ids), 1)
        return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), mask, positions)

    def measure(self, batch: Batch, output: Tensor) -> Tensor:
        right = (output[..., 1] == batch.labels) * batch.loss_mask
        return torch.stack(
            [x.double() for x in ((-output[..., 0] * batch.loss_mask).sum(), batch.loss_mask.sum(), right.sum())]
        )

    def scores(self, sums: Tensor) -> dict[str, float]:
        nats, answers, right = sums.tolist()
        return {"loss": nats / answers, "accuracy": right / answers}

    def describe(self, scores: dict[str, float], sums: Tensor) -> str:
        return f"{scores['accuracy']:.1%} of {int(sums[1])} answers"


def open_copy_task(_: Any) -> Any:
    from megagamma.data.sources import RunData

    return RunData(CopyTask(), {"copy": CopyTask(first=10**6)}, None, SYMBOLS, "copy task")


def train_copy_task(arguments: list[str]) -> int:
    from megagamma.config.io import parse_config
    from megagamma.environment import world_from_environment
    from megagamma.job import train

    world = world_from_environment()
    return train(
        parse_config(["--config", "configs/smoke.yaml", *arguments], world_size=world.size), world, open_copy_task
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_synthetic_task_trains_on_any_layout(tmp_path: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    common = ["--data.sequence_length", str(LENGTH), "--run.steps", "6", "--validation.interval", "3"]
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
    common = [
        "--data.sequence_length",
        str(LENGTH),
        "--schedule.shape",
        "constant",
        "--run.folder",
        str(tmp_path / "run"),
    ]
    assert one_rank.run(train_copy_task, [*common, "--run.steps", "2"]) == [0]
    assert one_rank.run(train_copy_task, [*common, "--run.steps", "4"]) == [0]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
