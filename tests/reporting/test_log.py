"""The files of numbers survive a kill, and the console line says what the numbers are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megagamma.config.schema import LoggingConfig
from megagamma.errors import MegagammaError
from megagamma.reporting.log import JsonLines, Reporter, console_line, duration

VALUES: dict[str, Any] = {
    "step": 7, "loss": 3.14159, "grad_norm": 0.98765, "lr": 2.5e-4, "tokens_per_second": 12345.6, "tflops": 0.01234,
    "mfu": 0.256, "memory_gib": 1.5, "eta_seconds": 125.0,
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_later_steps_are_dropped(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.write({"step": step, "loss": 1.0 / step})
    file.close()
    JsonLines(file.path).keep_until(3)
    assert [line["step"] for line in lines(file.path)] == [1, 2, 3]
    # A resumed run goes on in the same file.
    again = JsonLines(file.path)
    again.keep_until(3)
    again.write({"step": 4, "loss": 0.1})
    assert [line["step"] for line in lines(file.path)] == [1, 2, 3, 4]
    JsonLines(file.path).keep_until(0)
    assert file.path.read_text() == ""


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "{", '{"step": 2, "loss": 0.5', "\0\0\0"])
def test_line_that_a_kill_cut_off_is_dropped(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n' + tail)
    file = JsonLines(path)
    # Step 2 may stay if it is whole; a part of its line may not, or the next line would be glued to it.
    file.keep_until(2)
    file.write({"step": 2, "loss": 0.5})
    assert lines(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize("tail", ["5", "null", "[1]"])
def test_line_that_is_no_object_is_dropped(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + tail + "\n")
    JsonLines(path).keep_until(2)
    assert lines(path) == [{"step": 1}]


def test_nothing_to_keep(tmp_path: Path) -> None:
    JsonLines(tmp_path / "metrics.jsonl").keep_until(3)
    assert not list(tmp_path.iterdir())


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    assert lines(file.path) == [{"step": 1}], "without close(), as after a kill"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_json_has_no_word_for(tmp_path: Path, value: float) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "loss": value, "lr": 0.5, "text": "NaN"})
    assert file.path.read_text() == '{"step": 1, "loss": null, "lr": 0.5, "text": "NaN"}\n'


def test_unwritable_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MegagammaError, match=r"metrics\.jsonl: cannot be written .*directory"):
        JsonLines(tmp_path / "missing" / "metrics.jsonl").write({"step": 1})


def test_full_disk_is_one_clear_error() -> None:
    # The device on which every write fails for want of space.
    file = JsonLines(Path("/dev/full"))
    with pytest.raises(MegagammaError, match=r"cannot be written .*free some space"):
        file.write({"step": 1})
    # What could not be written must not be met again, as an OSError, by the clean-up that follows.
    file.close()


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


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(tmp_path, LoggingConfig(wandb="disabled"), "run", {}, is_main=False, start_step=0)
    reporter.step(VALUES, 10, console=True, record=True)
    reporter.warn("mind this")
    reporter.event("start")
    reporter.sample(1, "The ", "end")
    reporter.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")
