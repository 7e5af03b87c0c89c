"""docs/scaling_out.md: it is what the planner says now, its layouts are the least that fit, and published memory is met."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megagamma.commands import rehearse
from megagamma.config.resolve import validate
from megagamma.planning.flops import parameter_counts
from megagamma.planning.scaling_out import DEVICE_BYTES, MEASURED, TENSOR, laid_out, planned_like, preset, recommend

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_its_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "page.md"
    assert rehearse.main(["--scaling_out", str(written)]) == 0
    assert f"written to {written}" in capsys.readouterr().out
    advice = "run `python tools/rehearse.py --scaling_out docs/scaling_out.md`"
    assert written.read_text() == (ROOT / "docs" / "scaling_out.md").read_text(), advice


@pytest.mark.parametrize(("name", "gpus"), [("7b", 64), ("70b", 1024), ("175b", 4096)])
def test_a_recommended_layout_is_legal_and_the_least_that_fits(name: str, gpus: int) -> None:
    config = preset(ROOT, name, 51_200)
    choice = recommend(config, gpus, 1024)
    assert choice is not None
    validate(choice.config, gpus)
    parallel = choice.config.parallel
    assert (choice.memory.zero_stage, choice.config.model.recompute) == (1, "none")
    assert choice.memory.worst.device_bytes <= DEVICE_BYTES
    assert parallel.tensor * parallel.pipeline * choice.memory.data_size == gpus
    smaller = [(t, p) for t in TENSOR for p in (1, 2, 4) if t * p < parallel.tensor * parallel.pipeline]
    assert all(
        laid_out(config, gpus, t, p, 1, "none", 1024).memory.worst.device_bytes > DEVICE_BYTES for t, p in smaller
    )
    if name != "7b":
        assert smaller


def test_what_fits_nowhere_is_said() -> None:
    assert recommend(preset(ROOT, "1t", 51_200), 8, 2048) is None


def test_time_is_that_of_20_tokens_per_parameter() -> None:
    """6 N D FLOPs and a little more for attention, at 0.4 x 989.4 TFLOP/s."""
    config = preset(ROOT, "70b", 32_000)
    choice = laid_out(config, 1024, 8, 4, 1, "none", 1024)
    n = parameter_counts(config.model).total
    simple = 6 * n * 20 * n / (1024 * 989.4e12 * 0.4)
    assert simple < choice.seconds < 1.1 * simple
    assert laid_out(config, 2048, 8, 4, 1, "none", 1024).seconds == pytest.approx(choice.seconds / 2)


def test_the_plan_agrees_with_published_memory() -> None:
    errors = [planned_like(one) / one.gib - 1 for one in MEASURED]
    assert all(abs(error) < 0.08 for error in errors) and sum(map(abs, errors)) / len(errors) < 0.03, errors
    # What another micro batch, or another layout, would say.
    assert abs(planned_like(dataclasses.replace(MEASURED[0], micro_batch=4)) / MEASURED[0].gib - 1) > 0.2
    assert abs(planned_like(dataclasses.replace(MEASURED[0], pipeline=2, data=4)) / MEASURED[0].gib - 1) > 0.2
