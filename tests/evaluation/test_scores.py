"""Score files and tables, without a model: what is kept, found again, refused and shown."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest

from megagamma.errors import EvaluationError
from megagamma.evaluation.scores import (
    KEYS,
    ScoreFile,
    Scores,
    as_table,
    key_of,
    leading,
    metric,
    plain,
    read_scores,
    reason,
)


def entry(name: str, value: float | None, smooth: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "metric": name, "filter": "none", "value": value, "stderr": 0.01, "higher_is_better": not smooth,
        "smooth": smooth, **more,
    }  # fmt: skip


def record(task: str, *metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    key = {"identity": "w", "task_version": "1", "fewshot": 0, "limit": None, "seed": 1, "settings": {}, "versions": {}}
    return {"task": task, "kind": "task", "n": 9, "n_total": 9, "subsampled": False, "metrics": list(metrics), **key,
            **more}  # fmt: skip


def test_plain_values_are_strict_json() -> None:
    value = {
        1: numpy.float32(0.5),
        "b": [numpy.int64(3), math.nan, math.inf],
        "c": (True, None, Path("x")),
        "d": "text",
    }
    assert plain(value) == {"1": 0.5, "b": [3, None, None], "c": [True, None, "x"], "d": "text"}
    assert json.loads(json.dumps(plain(value), allow_nan=False))


@pytest.mark.parametrize("key", KEYS)
def test_all_that_a_score_depends_on_is_in_its_key(key: str) -> None:
    assert key_of(record("a")) == key_of({**record("a"), "n": 10, "metrics": []})
    assert key_of(record("a")) != key_of({**record("a"), key: "other"})


def test_the_metric_that_stands_for_a_task() -> None:
    both = record("a", entry("choice_prob", 0.3, True), entry("acc", 0.5), entry("acc_norm", 0.6))
    assert leading(both, False)["metric"] == "acc_norm"  # type: ignore[index]
    assert leading(both, True)["metric"] == "choice_prob"  # type: ignore[index]
    other = record("a", entry("answer_nats_per_byte", 2.0, True), entry("f1", 0.5))
    assert leading(other, False)["metric"] == "f1"  # type: ignore[index]
    assert leading(record("a", entry("acc", 0.5)), True) is None
    assert leading(record("a", entry("choice_prob", 0.5, True)), False) is None
    filters = record("a", entry("exact_match", 0.1, filter="strict"), entry("exact_match", 0.2, filter="flexible"))
    assert metric(filters, "exact_match")["value"] == 0.1  # type: ignore[index]
    assert metric(filters, "exact_match", "flexible")["value"] == 0.2  # type: ignore[index]
    assert metric(filters, "acc") is None


def test_a_file_of_scores(tmp_path: Path) -> None:
    file = ScoreFile(tmp_path)
    file.add(record("a", entry("acc", 0.5)))
    file.add(record("b", entry("acc", 0.25, chance=0.2)))
    file.add(record("a", entry("acc", None)))
    file.add(record("a", entry("acc", 0.75), seed=2))
    again = ScoreFile(tmp_path)
    assert [(one["task"], one["seed"]) for one in again.records] == [("b", 1), ("a", 1), ("a", 2)]
    assert again.find(record("a"))["metrics"][0]["value"] is None  # type: ignore[index]
    assert again.find(record("a", seed=3)) is None
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [(row["task"], row["value"], row["chance"]) for row in rows] == [
        ("b", "0.25", "0.2"), ("a", "", ""), ("a", "0.75", ""),
    ]  # fmt: skip
    assert rows[0]["identity"] == "w"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2, "records": []}', '{"format": 1, "records": [{"metrics": []}]}']
)
def test_a_corrupt_file_is_set_aside(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(EvaluationError, match=r"scores\.json: .*: delete it to score anew"):
        read_scores(tmp_path / "scores.json")
    logged: list[str] = []
    assert ScoreFile(tmp_path, logged.append).records == []
    assert (tmp_path / "scores.json.damaged").read_text() == text
    assert len(logged) == 1 and "set aside as scores.json.damaged" in logged[0]
    # The next one does not take its place.
    (tmp_path / "scores.json").write_text("{")
    ScoreFile(tmp_path, logged.append)
    assert (tmp_path / "scores.json.damaged").read_text() == text
    assert (tmp_path / "scores.json.damaged-2").read_text() == "{"


def test_values_by_name() -> None:
    scores = Scores("w", [record("a", entry("em", 0.1, filter="x"), entry("em", 0.2, filter="y"), entry("f1", None))])
    assert scores.flat() == {"a/em": 0.1, "a/em@y": 0.2}
    assert (scores.value("a", "em"), scores.value("a", "em", "y"), scores.value("b", "em")) == (0.1, 0.2, None)


def test_table() -> None:
    records = [
        record("a", entry("acc", 0.5, chance=0.25), entry("loss", 2.0, True), n=3, subsampled=True),
        record("b", entry("em", None, filter="x", stderr=None, higher_is_better=None), fewshot=None),
    ]
    assert as_table(records, {"c": "no data"}).splitlines() == [
        "| task | shots | n | metric | score | chance | better |",
        "|---|---|---|---|---|---|---|",
        "| a | 0 | 3* | acc | 0.5000 +- 0.0100 | 0.2500 | higher |",
        "| a | 0 | 3* | loss ~ | 2.0000 +- 0.0100 | - | lower |",
        "| b | - | 9 | em (x) | - | - | - |",
        "* only a part of the set was scored",
        "not scored: c: no data",
    ]


def test_errors_in_one_line() -> None:
    assert reason(EvaluationError("two\n lines")) == "two lines"
    assert reason(KeyError("x")) == "KeyError: 'x'"
    assert len(reason(ValueError("x" * 1000))) == 303
