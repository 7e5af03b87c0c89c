"""The files of numbers survive a kill, and the console line says what the numbers are."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from megagamma.config.schema import LoggingConfig
from megagamma.reporting.log import Reporter, console_line, duration

VALUES: dict[str, Any] = {
    "step": 7, "loss": 3.14159, "grad_norm": 0.98765, "lr": 2.5e-4, "tokens_per_second": 12345.6, "tflops": 0.01234,
    "mfu": 0.256, "memory_gib": 1.5, "eta_seconds": 125.0,
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (60, "1m00s"), (200, "3m20s"), (3599, "59m59s"), (3600, "1h00m"),
     (7500, "2h05m"), (360000, "100h00m")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_console_line() -> None:
    text = console_line(VALUES, 1000)
    for part in (
        "step    7/1000", "loss 3.1416", "grad 0.988", "lr 2.50e-04", "12,346 tok/s", "0.0123 TFLOP/s", "MFU 25.6%",
        "1.50 GiB", "eta 2m05s",
    ):  # fmt: skip
        assert part in text
    assert "\n" not in text


def test_console_line_of_numbers_that_are_none() -> None:
    text = console_line({**VALUES, "loss": math.nan, "grad_norm": math.inf, "mfu": math.nan}, 10)
    for part in ("loss n/a", "grad n/a", "MFU n/a"):
        assert part in text


def test_reporter_records_and_prints_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(tmp_path, LoggingConfig(wandb="disabled"), "run", {}, is_main=True, start_step=0)
    reporter.step({**VALUES, "step": 1}, 10, console=True, record=True)
    reporter.step({**VALUES, "step": 2}, 10, console=False, record=True)
    reporter.step({**VALUES, "step": 3}, 10, console=True, record=False)
    reporter.warn("mind this")
    reporter.sample(3, "The ", "end")
    reporter.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    events = lines(tmp_path / "events.jsonl")
    assert [(line["event"], line["text"]) for line in events] == [("warning", "mind this")]
    assert lines(tmp_path / "samples.jsonl") == [{"step": 3, "prompt": "The ", "text": "end"}]
    said = capsys.readouterr()
    assert [line.split()[1] for line in said.out.splitlines() if line.startswith("step")] == ["1/10", "3/10"]
    assert "sample at step 3: 'The end'" in said.out
    assert said.err == "WARNING mind this\n"


def reporter_of(folder: Path, start_step: int | None) -> Reporter:
    return Reporter(folder, LoggingConfig(wandb="disabled"), "run", {}, is_main=True, start_step=start_step)


def test_steps_without_a_checkpoint_are_archived_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All checkpoints are gone: the run begins anew, and its former numbers stay beside."""
    for number in (1, 2):
        reporter = reporter_of(tmp_path, None)
        reporter.step({**VALUES, "step": 1, "loss": float(number)}, 10, console=False, record=True)
        reporter.sample(1, "The ", f"end {number}")
        reporter.close()
    reporter_of(tmp_path, None).close()
    assert [lines(tmp_path / f"metrics.before-{number}.jsonl")[0]["loss"] for number in (1, 2)] == [1.0, 2.0]
    assert lines(tmp_path / "samples.before-2.jsonl")[0]["text"] == "end 2"
    assert not (tmp_path / "metrics.jsonl").exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and "metrics.jsonl has steps, and there is no checkpoint to resume from" in said[0]
    assert "kept in metrics.before-2.jsonl" in said[2]
    assert ["WARNING " + line["text"] for line in lines(tmp_path / "events.jsonl")] == said


def test_a_resume_from_step_0_archives_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative control: there is a checkpoint, and later steps are made again from it."""
    reporter = reporter_of(tmp_path, None)
    reporter.step({**VALUES, "step": 1}, 10, console=False, record=True)
    reporter.close()
    reporter_of(tmp_path, 0).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert capsys.readouterr().err == ""


def test_lines_that_cannot_be_read_are_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "note": "\xff"}\n\xff\xfe\n{"step": 3}\n')
    reporter_of(tmp_path, 3).close()
    assert [line["step"] for line in reporter_of(tmp_path, 3).metrics.read()] == [1, 2, 3]
    assert (tmp_path / "metrics.unreadable.jsonl").read_bytes() == b"\xff\xfe\n"
    assert "lines that cannot be read: 1; kept as they are in metrics.unreadable.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["deleted", "renamed", "renamed and made anew", "file deleted", "file replaced"])
def test_a_folder_that_is_lost_is_noticed(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    reporter = reporter_of(folder, None)
    reporter.step(VALUES, 10, console=False, record=True)
    assert reporter.lost() == ""
    if fault == "deleted":
        shutil.rmtree(folder)
    elif fault.startswith("file"):
        (folder / "metrics.jsonl").unlink()
    else:
        folder.rename(tmp_path / "elsewhere")
    if fault == "renamed and made anew":
        folder.mkdir()
    if fault == "file replaced":
        (folder / "metrics.jsonl").touch()
    what = "metrics.jsonl was deleted or replaced" if fault.startswith("file") else "the folder was deleted or renamed"
    assert what in reporter.lost()
    reporter.close()


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(tmp_path, LoggingConfig(wandb="disabled"), "run", {}, is_main=False, start_step=0)
    reporter.step(VALUES, 10, console=True, record=True)
    reporter.warn("mind this")
    reporter.event("start")
    reporter.sample(1, "The ", "end")
    reporter.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")
