"""Runs side by side, from folders written by hand: no training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megagamma.config.schema import Config
from megagamma.errors import DataError
from megagamma.reporting.comparison import as_table, plot
from megagamma.runs.compare import RunRecord, comparison, read_run
from megagamma.runs.folder import RunFolder


def make_run(path: Path, gamma: float, lines: list[dict[str, Any]]) -> Path:
    run, config = RunFolder(path), Config()
    config.init.gamma = gamma
    run.write_config(config)
    metrics = run.metrics()
    for line in lines:
        metrics.write(line)
    metrics.close()
    return path


def lines(count: int, *, validation: str = "") -> list[dict[str, Any]]:
    """Steps of 100 tokens and 30 seconds, losses 6, 5, 4 ..., with a validation after the last."""
    found: list[dict[str, Any]] = [
        {"step": n, "tokens": 100 * n, "loss": 7.0 - n, "seconds": 30.0 * n, "tokens_per_second": 10.0 * n}
        for n in range(1, count + 1)
    ]
    if validation:
        found[-1] |= {f"val/{validation}/loss": 4.5, f"val/{validation}/bits_per_byte": 2.25}
    return found


def test_a_row_has_where_the_run_ended(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", 0.75, lines(3, validation="books")))
    (row,) = comparison([run])
    assert row == {
        "run": "a", "gamma": 0.75, "steps": 3, "tokens": 300, "train_loss": 4.0, "books_nats_per_token": 4.5,
        "books_bits_per_byte": 2.25, "tokens_per_second": 20.0, "minutes": 1.5,
    }  # fmt: skip


def test_last_value_is_the_last_that_was_measured(tmp_path: Path) -> None:
    measured = lines(3, validation="books")
    measured[0]["val/books/loss"] = 6.5
    measured[2]["loss"] = math.nan  # null in the file
    del measured[2]["val/books/loss"]
    run = read_run(make_run(tmp_path / "a", 1.0, measured))
    assert run.last("loss") == 5.0
    assert run.last("val/books/loss") == 6.5
    assert run.last("nothing") is None
    assert run.curve("loss") == ([100, 200], [6.0, 5.0])
    assert run.curve("val/books/loss") == ([100], [6.5])


def test_runs_with_different_validation_sets_share_a_table(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / name, gamma, lines(2, validation=name)))
        for name, gamma in (("left", 0.5), ("right", 1.0))
    ]
    assert [run.validation_names for run in runs] == [["left"], ["right"]]
    header, _, left, right = as_table(comparison(runs)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, left, right)]
    assert len({len(row) for row in cells}) == 1
    column = cells[0].index("right_bits_per_byte")
    assert (cells[1][column], cells[2][column]) == ("", "2.2500")
    plot(runs, tmp_path / "folder" / "curves.png")
    assert (tmp_path / "folder" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_cells() -> None:
    table = as_table([{"a": 1234567, "b": 0.123456, "c": 12345.6, "d": "text"}])
    assert table.splitlines()[-1] == "| 1,234,567 | 0.1235 | 12,346 | text |"


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.yaml is missing"):
        read_run(tmp_path)
    with pytest.raises(DataError, match=r"metrics\.jsonl has no steps yet: train first"):
        read_run(make_run(tmp_path / "new", 1.0, []))


def test_a_record_needs_no_folder() -> None:
    record = RunRecord("x", 1.0, lines(1), [])
    assert comparison([record])[0]["minutes"] == 0.5
