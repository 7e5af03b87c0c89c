"""Which steps are recorded and printed, and that their numbers belong together."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from support.processes import metrics
from support.ranks import RankPool
from support.synthetic import LENGTH, train_copy_task

from megagamma.config.schema import LoggingConfig
from megagamma.training.callbacks.base import Step
from megagamma.training.callbacks.metrics import is_printed


def test_printed_steps() -> None:
    logging = LoggingConfig(console_interval=4)
    steps = [Step(number, range(0), 0.0, number == 10, 0.0) for number in range(1, 11)]
    assert [step.number for step in steps if is_printed(step, logging)] == [1, 4, 8, 10]


def printed(arguments: list[str]) -> tuple[int, str]:
    """Inside a rank: a run and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = train_copy_task(arguments)
    return code, out.getvalue()


def test_recorded_steps_and_their_numbers(tmp_path: Path, one_rank: RankPool) -> None:
    given = ["--run.folder", str(tmp_path / "run"), "--run.steps", "5", "--validation.at_end", "false"]
    given += ["--logging.interval", "2", "--logging.console_interval", "3", "--checkpoint.at_end", "false"]
    code, out = one_rank.run(printed, given)[0]
    assert code == 0
    lines = metrics(tmp_path / "run")
    # The last step has a line on any interval.
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step ")] == ["1/5", "3/5", "5/5"]
    for line in lines:
        tokens = 8 * LENGTH
        assert (line["samples"], line["tokens"]) == (8 * line["step"], tokens * line["step"])
        assert line["tokens_per_second"] == pytest.approx(tokens / line["step_seconds"])
        assert line["tflops"] > 0 and line["memory_gib"] > 0
        assert 0 < line["mfu"] < 1, "against the rate of a matrix product measured here"
        assert line["grad_norm"] > 0 and line["lr"] > 0
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert lines[-1]["eta_seconds"] == 0 < lines[0]["eta_seconds"]
    assert "slowest_rank" not in lines[-1], "one process has none to compare with"
