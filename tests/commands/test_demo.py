"""The demo: what its sentences may say, and all of it once, short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagamma.commands.demo import TEXT, TOY, text_sentence, toy_sentence
from megagamma.config.io import parse_config
from megagamma.runs.compare import RunRecord


def record(gamma: float, values: dict[str, Any]) -> RunRecord:
    return RunRecord("x", gamma, [{"step": 1, "tokens": 1, **values}], [])


def test_sentences_say_what_was_measured() -> None:
    half = record(0.5, {"val/held_out/composed": 0.06, "val/held_out/memorized": 0.69, "val/seen/right": 0.98})
    one = record(1.0, {"val/held_out/composed": 0.81, "val/held_out/memorized": 0.0, "val/seen/right": 1.0})
    said = toy_sentence([half, one])
    assert (
        "gamma 0.5 composes 6% of its answers and memorized 69%; gamma 1.0 composes 81% of its answers and memorized 0%"
        in said
    )
    assert "at least 98% right" in said and "One seed each" in said
    # The other way round it says the other thing.
    assert "gamma 0.5 composes 81%" in toy_sentence([one, half])
    text = text_sentence([4.4, 4.6, 4.2], 250)
    assert "gamma 1 4.200, gamma 0.5 4.400, inner gamma 1 4.600" in text and "undecided" in text


@pytest.mark.parametrize("arm", [*TOY, *TEXT], ids=lambda arm: arm.name)
def test_arms_are_configs(arm: Any) -> None:
    config = parse_config(["--config", arm.config, *arm.options])
    assert f"{config.init.gamma:g}" in arm.name
    assert (config.init.exponents == {"embedding": 0.5, "head": 0.5}) == ("inner" in arm.name)
    assert config.precision.dtype == "fp32", "alike on every CPU"


@pytest.mark.slow
@pytest.mark.launcher
def test_all_of_it(tmp_path: Path, root: Path, data_cache: str) -> None:
    """Every stage with few steps; a second start has nothing to train."""
    words = [
        "--output",
        str(tmp_path),
        "--toy_steps",
        "2",
        "--run.steps",
        "2",
        "--data.corpus",
        "tiny",
        "--data.cache",
        data_cache,
    ]
    command = [sys.executable, str(root / "tools" / "demo.py"), *words]
    first = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for text in ("1. Asked for a pair of functions", "2. On text, 2 steps end at", "3. Open ", "continuation"):
        assert text in first.stdout
    for name in ("toy.html", "report.html", "table.md", "loss.png", "inner_gamma_1/dynamics.jsonl"):
        assert (tmp_path / name).stat().st_size > 100
    assert "Answers over training" in (tmp_path / "toy.html").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0 and "Whole demo" in again.stdout
