"""The command that checks a GPU: refused without one, and its whole way tried on the CPU with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megagamma.cli import main_guard
from megagamma.commands import gpu_check
from megagamma.planning.flops import model_flops_utilization

PASSING, FAILING = "test_keys_are_unambiguous", "test_no_such_test"
TINY = [
    *("--device", "cpu", "--model", "model/1m", "--sequence_length", "32", "--micro_batch_size", "1", "--steps", "1"),
    *("--model.vocab_size", "128", "--precision.dtype", "fp32"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_guard(lambda: gpu_check.main([])) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: --device=cuda needs a GPU, and torch sees none here: run it on")
        and said.count("\n") == 1
    )


@pytest.mark.launcher
def test_the_whole_way_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "check"
    tests = ["--tests", f"tests/initialization/test_streams.py -k {PASSING}"]
    assert gpu_check.main([*TINY, "--output", str(output), *tests]) == 0
    found = json.loads(output.with_suffix(".json").read_text())
    assert [(name.split(".")[-1], outcome) for name, outcome in found["tests"].items()] == [(PASSING, "passed")]
    speed = found["benchmark"]
    assert speed["mfu"] == model_flops_utilization(
        speed["tokens_per_second"] * speed["flops_per_token"], speed["peak_flops"]
    )
    assert (speed["dtype"], speed["sequence_length"]) == ("float32", 32)
    text = output.with_suffix(".md").read_text()
    assert speed["formula"] in text and f"| tokens/s | {speed['tokens_per_second']:,.0f} |" in text
    assert "torch" in found["machine"]["versions"] and PASSING in text


@pytest.mark.launcher
def test_no_test_or_a_benchmark_that_fails_is_no_success(tmp_path: Path) -> None:
    output = tmp_path / "check"
    tests = ["--tests", f"tests/initialization/test_streams.py -k {FAILING}"]
    assert gpu_check.main([*TINY, "--model.num_layers=-1", "--output", str(output), *tests]) == 1
    found = json.loads(output.with_suffix(".json").read_text())
    assert found["tests"] == {} and "model.num_layers=-1" in found["benchmark"]["error"]
    assert "| error |" in output.with_suffix(".md").read_text()


def test_outcomes_of_a_report() -> None:
    report = (
        "<testsuites><testsuite><testcase classname='a' name='b'/><testcase classname='a' name='c'><failure/></testcase>"
        "<testcase classname='a' name='d'><error/></testcase><testcase classname='a' name='e'><skipped/></testcase>"
        "</testsuite></testsuites>"
    )
    assert gpu_check.outcomes(report) == {"a.b": "passed", "a.c": "failed", "a.d": "failed", "a.e": "skipped"}
