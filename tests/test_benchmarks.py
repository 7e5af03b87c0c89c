"""The benchmark of training really trains ours and a peer, and its page says what was measured."""

import pytest

from megagamma.benchmarks.page import machine, page
from megagamma.benchmarks.training import OURS, PEERS, measure, shape_arguments
from megagamma.commands import benchmark
from megagamma.errors import MegagammaError


@pytest.mark.launcher
def test_two_contenders_in_turns() -> None:
    result = measure("toy", 1, ["transformers fp32"])
    assert set(result["contenders"]) == {OURS, "transformers fp32"} and result["best_peer"] == "transformers fp32"
    for values in result["contenders"].values():
        assert 0 < values["low"] <= values["tokens_per_second"] <= values["high"]
    speeds = [values["tokens_per_second"] for values in result["contenders"].values()]
    assert result["ratio"] == pytest.approx(speeds[0] / speeds[1])
    assert result["parameters"] == 98_624 and result["tokens"] == 1024
    text = page("python tools/benchmark.py train", {"machine": machine(), "train": [result]})
    assert f"**{OURS} float32** | {speeds[0]:,.0f} |" in text and f"| {speeds[0] / speeds[1]:.2f} |" in text


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["losses"])
    assert "losses is not a benchmark: use init, loss" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.main(["train", "--peers", "jax"])
    assert next(iter(PEERS)) in capsys.readouterr().err


def test_shapes() -> None:
    assert shape_arguments("17m")[1].endswith("configs/model/17m.yaml")
    assert shape_arguments("demo")[1].endswith("configs/demo.yaml")
    assert shape_arguments("17m-gated") == shape_arguments("17m")[:2]


def test_a_contender_that_ends_is_named() -> None:
    with pytest.raises(MegagammaError, match="benchmark: megagamma ended with exit code 1"):
        measure("toy", 1, [], ["--optimizer.lr=-1"])
