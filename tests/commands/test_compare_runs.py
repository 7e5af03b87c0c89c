"""Two trained runs side by side: the table, its numbers and the picture."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import attempt, metrics
from support.ranks import RankPool

from megagamma.errors import DataError
from megagamma.reporting.comparison import as_table
from megagamma.runs.compare import comparison, read_run

GAMMAS = {"usual": 0.5, "small": 1.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str) -> list[Path]:
    """A run at gamma 0.5 and one at 1.0, of 12 steps, validated at 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("runs")
    for name, gamma in GAMMAS.items():
        arguments = ["--run.folder", str(folder / name), "--data.cache", data_cache, "--run.steps", "12"]
        arguments += ["--validation.interval", "5", "--init.gamma", str(gamma)]
        assert one_rank.run(attempt, arguments, True)[0] == ("", 0, "")
    return [folder / name for name in GAMMAS]


def test_rows_are_what_the_runs_wrote(runs: list[Path]) -> None:
    rows = comparison([read_run(folder) for folder in runs])
    assert [(row["run"], row["gamma"]) for row in rows] == [("usual", 0.5), ("small", 1.0)]
    for row, folder in zip(rows, runs, strict=True):
        written = metrics(folder)
        assert (row["steps"], row["tokens"]) == (12, 12 * 8 * 64)
        assert row["train_loss"] == written[-1]["loss"]
        assert row["tiny_nats_per_token"] == written[-1]["val/tiny/loss"]
        assert row["tiny_bits_per_byte"] == written[-1]["val/tiny/bits_per_byte"]
        assert row["tokens_per_second"] == statistics.median(line["tokens_per_second"] for line in written)
    # Negative control: the two initializations train differently.
    assert rows[0]["train_loss"] != rows[1]["train_loss"]


@pytest.mark.launcher
def test_tool_writes_table_numbers_and_picture(runs: list[Path], root: Path, tmp_path: Path) -> None:
    from PIL import Image

    tool = [sys.executable, str(root / "tools" / "compare_runs.py"), *map(str, runs), "--output", str(tmp_path / "out")]
    found = subprocess.run(tool, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    rows = comparison([read_run(folder) for folder in runs])
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == rows
    table = (tmp_path / "out" / "table.md").read_text()
    assert table == as_table(rows) + "\n"
    assert table in found.stdout
    with Image.open(tmp_path / "out" / "loss.png") as image:
        width, height = image.size
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    # Training beside validation on one set; both of matplotlib's first two colours are drawn, as lines of two runs.
    assert width > 2 * height
    assert {(31, 119, 180), (255, 127, 14)} <= colours


def test_table_form() -> None:
    text = as_table([{"run": "a", "loss": 1.23456, "tokens": 12345}, {"run": "b", "speed": 54321.9, "loss": None}])
    assert text.splitlines() == [
        "| run | loss | tokens | speed |",
        "|---|---|---|---|",
        "| a | 1.2346 | 12,345 |  |",
        "| b | None |  | 54,322 |",
    ]


def test_folder_that_is_no_run(runs: list[Path], root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not the folder of a run: config\.yaml is missing"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl has no steps yet"):
        read_run(tmp_path)
    tool = [sys.executable, str(root / "tools" / "compare_runs.py"), str(tmp_path)]
    found = subprocess.run(tool, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1


def test_run_that_is_still_being_written(runs: list[Path], tmp_path: Path) -> None:
    """A comparison while a run is going on: its last line may be half there."""
    (tmp_path / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    text = (runs[0] / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[:-30])
    assert comparison([read_run(tmp_path)])[0]["steps"] == 11


def test_loss_that_was_no_number(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    lines = metrics(runs[0])
    lines[-1]["loss"] = None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert comparison([read_run(tmp_path)])[0]["train_loss"] == lines[-2]["loss"]
