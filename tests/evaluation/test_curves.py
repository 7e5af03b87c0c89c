"""Scores over checkpoints and over runs: which metric stands for a task, order, errors, chance, what does not compare."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from megagamma.errors import EvaluationError
from megagamma.evaluation import curves
from megagamma.evaluation.curves import Scored
from megagamma.evaluation.scores import Scores


def metric(name: str, value: float | None, smooth: bool = False, chance: float | None = None) -> dict[str, Any]:
    return {
        "metric": name, "filter": "none", "value": value, "stderr": 0.01, "higher_is_better": True, "smooth": smooth,
        "chance": chance,
    }  # fmt: skip


def record(task: str, metrics: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    common = {"kind": "task", "fewshot": 0, "n": 100, "n_total": 100, "subsampled": False}
    return {"task": task, "metrics": metrics, **common, **more}


def checkpoint(run: str, gamma: float | None, step: int, accuracy: float, **more: Any) -> Scored:
    choice = [metric("acc", accuracy, chance=0.25), metric("acc_norm", accuracy + 0.1, chance=0.25)]
    choice += [metric("choice_prob", 0.3, True, 0.25), metric("choice_prob_norm", accuracy / 2, True, 0.25)]
    records = [
        record("arc_easy", choice, **more),
        record("gsm8k", [metric("exact_match", 0.0), metric("answer_nats_per_byte", 2.0, True)]),
        record("part_a", [metric("acc", 0.1)]),
        record("part_b", [metric("acc", 0.3)]),
        record("whole", [metric("acc", 0.2)], kind="group", members=["part_a", "part_b"]),
        record("inner", [metric("acc", 0.1)], kind="group", members=["part_a"]),
    ]
    return Scored(f"{run}@{step}", run, step, step * 1000, gamma, Scores("w", records))


ITEMS = [
    checkpoint("small", 1.0, 200, 0.6),
    checkpoint("small", 1.0, 100, 0.4),
    checkpoint("usual", 0.5, 100, 0.3),
    checkpoint("usual", 0.5, 200, 0.5),
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_curve_over_training() -> None:
    lines = curves.table(ITEMS).splitlines()
    assert cells(lines[0]) == [
        *("run", "gamma", "step", "tokens"),
        *("arc_easy acc_norm", "arc_easy choice_prob_norm ~", "gsm8k exact_match", "gsm8k answer_nats_per_byte ~"),
        "whole acc",  # in place of its members
    ]
    assert cells(lines[2])[:1] == ["chance"] and cells(lines[2])[4:7] == ["0.2500", "0.2500", "-"]
    assert [cells(line)[0] for line in lines[3:7]] == ["usual@100", "usual@200", "small@100", "small@200"]
    assert cells(lines[6])[1:5] == ["1", "200", "200,000", "0.7000 +- 0.0100"]


def test_table_per_gamma() -> None:
    rows = [cells(line) for line in curves.table(ITEMS, last_only=True).splitlines()[3:]]
    assert [row[:4] for row in rows[:2]] == [
        ["usual@200", "0.5", "200", "200,000"],
        ["small@200", "1", "200", "200,000"],
    ]
    assert [row[4] for row in rows[:2]] == ["0.6000 +- 0.0100", "0.7000 +- 0.0100"]


def test_what_does_not_compare_is_said() -> None:
    other = checkpoint("half", None, 100, 0.5, n=50, subsampled=True, fewshot=5)
    text = curves.table([*ITEMS, other])
    assert "note: arc_easy acc_norm was not scored alike everywhere: 0-shot on 100 documents, 5-shot on 50" in text
    assert "only a part" in text and "arc_easy acc_norm *" in text
    assert "note" not in curves.table(ITEMS) and "only a part" not in curves.table(ITEMS)
    moved = checkpoint("moved", 0.7, 100, 0.5, prompts_sha256="other")
    assert "arc_easy acc_norm was scored on other prompts" in curves.table([*ITEMS, moved])
    lacking = Scored("none@1", "none", 1, None, None, Scores("w", [record("gsm8k", [metric("exact_match", 0.5)])]))
    row = next(line for line in curves.table([*ITEMS, lacking]).splitlines() if "none@1" in line)
    assert cells(row) == ["none@1", "-", "1", "-", "-", "-", "0.5000 +- 0.0100", "-", "-"]


def test_files(tmp_path: Path) -> None:
    text = curves.write(ITEMS, tmp_path)
    assert (tmp_path / "scores.md").read_text() == text + "\n"
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == 4 * 5
    wanted = next(row for row in rows if (row["label"], row["metric"]) == ("small@100", "acc_norm"))
    assert (wanted["value"], wanted["stderr"], wanted["gamma"], wanted["step"]) == ("0.5", "0.01", "1.0", "100")


def test_a_line_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[list[int], list[float], str]] = []
    whole = Axes.errorbar

    def errorbar(self: Any, x: Any, y: Any, **more: Any) -> Any:
        drawn.append((list(x), list(y), more["label"]))
        return whole(self, x, y, **more)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    curves.plot(ITEMS, tmp_path / "curve.png")
    assert drawn[:2] == [
        ([100, 200], [0.5, 0.7], "small (gamma 1)"),
        ([100, 200], [0.4, 0.6], "usual (gamma 0.5)"),
    ]
    assert len(drawn) == 2 * 5


def test_nothing_to_show() -> None:
    with pytest.raises(EvaluationError, match="no scores to show"):
        curves.table([Scored("a", "a", 1, 1, 1.0, Scores("w"))])
