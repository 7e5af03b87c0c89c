"""The benchmark of training really trains ours and a peer, and its page says what was measured."""

import pytest

from megagamma.benchmarks.comparisons import DDP, measure_overhead, measure_ranks
from megagamma.benchmarks.costs import measure_curves, measure_memory
from megagamma.benchmarks.page import machine, merged, page
from megagamma.benchmarks.training import OURS, PEERS, measure, shape_arguments
from megagamma.commands import benchmark
from megagamma.errors import MegagammaError


@pytest.mark.launcher
def test_two_contenders_in_turns() -> None:
    result = measure("toy", 1, ["transformers fp32"], ["--run.compile=off"], ["fp32"])
    ours = f"{OURS} fp32"
    assert list(result["contenders"]) == [ours, "transformers fp32"] and result["peer_class"] == "LlamaForCausalLM"
    for values in result["contenders"].values():
        assert 0 < values["low"] <= values["tokens_per_second"] <= values["high"]
    speeds = [values["tokens_per_second"] for values in result["contenders"].values()]
    assert result["ratio"] == result["contenders"][ours]["ratio"] == pytest.approx(speeds[0] / speeds[1])
    assert result["parameters"] == 98_624 and result["tokens"] == 1024
    text = page(["python tools/benchmark.py train"], {"machine": machine(), "train": [result]})
    assert f"**{ours}** | {speeds[0]:,.0f} |" in text and f"| {speeds[0] / speeds[1]:.2f} |" in text


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["losses"])
    assert "losses is not a benchmark: use init, loss" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.main(["train", "--peers", "jax"])
    assert next(iter(PEERS)) in capsys.readouterr().err


def test_calls_on_one_page() -> None:
    here = machine()
    first = {
        "command": "a",
        "machine": here,
        "train": [{"shape": "toy", "x": 1}, {"shape": "17m"}],
        "init": {"ratio": 1.0},
    }
    second = {"command": "b", "machine": here, "train": [{"shape": "toy", "x": 2}], "loss": {"ratio": 2.0}}
    commands, results = merged([first, second])
    assert commands == ["a", "b"] and results["init"] and results["loss"]
    assert results["train"] == [{"shape": "toy", "x": 2}, {"shape": "17m"}]
    assert "    a\n    b\n" in page(commands, {key: results[key] for key in ("machine", "init")})
    with pytest.raises(MegagammaError, match="of another machine"):
        merged([{**first, "machine": here | {"cores": 999}}, second])


def test_shapes() -> None:
    assert shape_arguments("17m")[1].endswith("configs/model/17m.yaml")
    assert shape_arguments("demo")[1].endswith("configs/demo.yaml")
    assert shape_arguments("17m-gated") == shape_arguments("17m")[:2]


def test_a_contender_that_ends_is_named() -> None:
    with pytest.raises(MegagammaError, match="benchmark: megagamma fp32 ended with exit code 1"):
        measure("toy", 1, [], ["--optimizer.lr=-1"], ["fp32"])


@pytest.mark.slow
@pytest.mark.launcher
def test_ranks_are_what_they_say() -> None:
    found = measure_ranks("toy", 1, ["--data.sequence_length=16"])
    ours = {f"{OURS} fp32, ZeRO 0": 0, f"{OURS} fp32, ZeRO 1": 1, f"{OURS} bf16, ZeRO 1": 1}
    assert list(found["contenders"]) == [*ours, DDP] and found["reference"] == DDP
    assert found["tokens"] == 2 * 4 * 16, "4 sequences a rank"
    assert found["zero_stages"] == ours
    text = page(["x"], {"machine": machine(), "ranks": found})
    assert all(f"| {ratio:.2f} |" in text for ratio in found["ratios"].values())


@pytest.mark.launcher
def test_a_rank_that_ends_ends_its_group() -> None:
    with pytest.raises(MegagammaError, match="benchmark: megagamma fp32, ZeRO 0 ended with exit code 1"):
        measure_ranks("toy", 1, ["--optimizer.lr=-1"])


@pytest.mark.slow
@pytest.mark.launcher
def test_costs_and_overhead() -> None:
    memory = measure_memory("toy")
    # Adam's moments, weights and gradients are there at the least.
    assert all(memory[name] * 2**20 > 16 * 98_624 for name in ("ours_mib", "peer_mib", "planned_mib"))
    overhead = measure_overhead(10, ["--model.num_layers=1", "--data.sequence_length=16"])
    assert overhead["steps"] == 10
    assert 0 < overhead["low"] < overhead["share_of_a_step"] < overhead["high"] < 1
    text = page(["x"], {"machine": machine(), "memory": [memory], "overhead": overhead})
    assert f"{overhead['share_of_a_step']:.2%} of a step" in text and f"| {memory['planned_mib']:,.0f} |" in text


@pytest.mark.slow
def test_curves() -> None:
    found = measure_curves("toy", ["1m"], 1)
    curves = found["curves"]
    assert [point["at"] for point in curves["sequence length"]] == ["128", "256", "512", "1024", "2048"]
    assert len({point["tokens"] for point in curves["sequence length"]}) == 1, "constant tokens per step"
    assert curves["ranks"][1]["tokens"] == 2 * curves["ranks"][0]["tokens"]
    assert "| 2048 |" in page(["x"], {"machine": machine(), "curves": found})
