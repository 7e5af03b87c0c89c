"""The local task of held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megagamma.data.preparation.corpus import Source
from megagamma.data.preparation.prepare import PrepareSettings, prepare
from megagamma.errors import DataError
from megagamma.evaluation.continuation import write_continuation


def prepared(folder: Path, text: str, vocab_size: int) -> Path:
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(f"{number} " + text, encoding="utf-8")
    settings = PrepareSettings(
        str(folder / "data"), Source(inputs=[str(folder / "text")]), vocab_size=vocab_size, validation_fraction=0.5
    )
    return Path(prepare(settings))


def test_the_right_choice_goes_on(tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(3000))
    folder = write_continuation(prepared(tmp_path, words, 280), tmp_path / "task", count=30)
    lines = [json.loads(line) for line in (folder / "continuation.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    assert len({line["label"] for line in lines}) == 4
    for line in lines:
        last = int(line["context"].split()[-1].removeprefix("word"))
        right = [f"word{last + step}" for step in range(1, 7)]
        assert line["choices"][line["label"]].split() == right
        assert len(set(line["choices"])) == 4


def test_text_without_spaces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few spaces"):
        write_continuation(prepared(tmp_path, "語" * 9000, 270), tmp_path / "task")
