"""Held-out loss does not depend on the layout, and its units are what they are called."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankPool
from support.train import run_trainer

from megagamma.data.text import Corpus
from megagamma.data.text_batches import TextEvaluation


def last_line(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def arguments(folder: Path, cache: str, *more: str) -> list[str]:
    return [
        *("--run.folder", str(folder), "--data.cache", cache, "--run.steps", "4", "--validation.windows", "5"),
        *("--validation.full_at_end", "true", "--checkpoint.at_end", "false", *more),
    ]


def test_layouts_and_microbatches_agree(
    tmp_path: Path, one_rank: RankPool, two_ranks: RankPool, data_cache: str
) -> None:
    one = arguments(tmp_path / "one", data_cache, "--data.micro_batch_size", "8")
    assert one_rank.run(run_trainer, one) == [0]
    expected = last_line(tmp_path / "one")
    for name, more in {
        "data": [],
        "pipeline": ["--parallel.pipeline", "2"],
        "tensor": ["--parallel.tensor", "2"],
    }.items():
        assert two_ranks.run(run_trainer, arguments(tmp_path / name, data_cache, *more)) == [0, 0]
        found = last_line(tmp_path / name)
        for key in ("val/tiny/loss", "val/tiny/bits_per_byte", "val/tiny_full/loss", "val/tiny_full/bits_per_byte"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (name, key)
    # Five windows are not the whole set.
    assert abs(expected["val/tiny/loss"] - expected["val/tiny_full/loss"]) > 1e-4


def test_bits_per_byte(tmp_path: Path, one_rank: RankPool, data_cache: str) -> None:
    assert one_rank.run(run_trainer, arguments(tmp_path / "run", data_cache)) == [0]
    found = last_line(tmp_path / "run")
    corpus = Corpus(Path(data_cache) / "tiny", "validation")
    whole = TextEvaluation(corpus, 64)
    label_bytes = int(whole.batch(range(whole.size)).label_bytes.sum())
    nats = found["val/tiny_full/loss"] * (corpus.tokens - 1)
    assert found["val/tiny_full/bits_per_byte"] == pytest.approx(nats / (math.log(2) * label_bytes), rel=1e-6)
    # The text's own bytes differ by those of the first token only.
    assert label_bytes == pytest.approx(corpus.bytes, abs=16)
