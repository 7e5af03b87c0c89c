"""megagamma inspect_init: answers for any size, samples what a run draws, and tells users what is wrong."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megagamma.cli import main_guard
from megagamma.commands import inspect_init
from megagamma.config.schema import Config, InitConfig, resolve_model
from megagamma.initialization.report import WeightStatistics
from megagamma.initialization.streams import normal_
from megagamma.planning import preview as inspection
from megagamma.planning.preview import compare_schemes, sample_rows

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "inspect_init.py"


@pytest.fixture
def tool():
    return inspect_init


@pytest.fixture
def run(tool, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "SAMPLE_ELEMENTS", 1 << 16)

    def call(*arguments):
        code = main_guard(lambda: tool.main([str(argument) for argument in arguments]))
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def preset(name):
    return f"--config={ROOT}/configs/model/{name}.yaml"


@pytest.mark.launcher
def test_the_largest_preset_in_seconds_from_anywhere(tmp_path):
    begin = time.perf_counter()
    command = [sys.executable, str(SCRIPT), preset("70b"), "--compare", "--json", "init.json"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert time.perf_counter() - begin < 60  # some 4 s on two idle cores
    written = json.loads((tmp_path / "init.json").read_text())
    assert written["cost"]["parameters"]["total"] == 74_345_377_792
    assert all(abs(row["z"]) < 5 for row in written["matrices"])
    assert max(row["sampled_elements"] for row in written["matrices"]) <= 1 << 22
    assert "32000 is assumed" in found.stderr
    assert "notice" not in found.stdout


@pytest.mark.parametrize("name", ["1m", "17m", "0.7b", "70b"])
def test_output_names_shape_table_norms_and_cost(run, name):
    code, out, err = run(preset(name))
    assert code == 0, err
    for word in ("layers, hidden", "target std", "embedding", "mlp_down", "first norm", "parameters", "FLOPs per token",
                 "GiB on the largest rank", "20 tokens per parameter"):  # fmt: skip
        assert word in out
    assert "WARNING" not in out
    assert ("notice" in err) is (name != "0.7b")


def test_knobs_reach_the_table(run, tmp_path):
    path = tmp_path / "x.json"
    arguments = ("--model.vocab_size", 1000, "--init.gamma", 0.5, "--init.key", 1.25, "--json", path)
    code, out, err = run(preset("17m"), *arguments)
    assert (code, err) == (0, "")
    rows = {row["role"]: row for row in json.loads(path.read_text())["matrices"]}
    assert rows["query"]["asked_std"] == pytest.approx(384**-0.5)
    assert rows["key"]["asked_std"] == pytest.approx(384**-1.25)
    assert rows["key"]["gamma"] == 1.25
    assert rows["mlp_down"]["asked_std"] == pytest.approx(1024**-0.5 / 4)
    assert rows["mlp_down"]["effective_gamma"] == pytest.approx(0.5 + math.log(4) / math.log(1024))
    assert rows["embedding"]["shape"] == [1024, 384]  # padded
    assert "1,000 (padded to 1,024)" in out


def test_a_saturating_epsilon_is_warned_about(run):
    _, out, _ = run(preset("7b"), "--model.norm_epsilon", 1e-5)
    assert "WARNING first norm (embedding)" in out
    assert "output rms 0.077" in out


def test_memory_follows_the_layout(run, tmp_path):
    def memory(*arguments):
        path = tmp_path / "x.json"
        code, _, err = run(preset("7b"), "--data.micro_batch_size", 1, "--json", path, *arguments)
        assert code == 0, err
        return json.loads(path.read_text())["cost"]

    alone = memory()
    assert alone["layout"] == {
        "world_size": 1, "data": 1, "tensor": 1, "pipeline": 1, "zero_stage": 1, "dtype": "bf16"
    }  # fmt: skip
    spread = memory("--world_size", 16, "--parallel.tensor", 2, "--parallel.pipeline", 2)
    assert spread["layout"]["data"] == 4
    assert spread["largest_rank"]["device_bytes"] < alone["largest_rank"]["device_bytes"] / 2
    offloaded = memory("--deepspeed_config", ROOT / "configs/deepspeed/zero3_offload.json", "--world_size", 4)
    assert offloaded["largest_rank"]["offloaded_bytes"] > 0
    assert memory("--deepspeed_config", ROOT / "configs/deepspeed/zero0.json")["layout"]["dtype"] == "fp32"
    steps = alone["budget_steps"]
    assert (steps - 1) * 32 * 4096 < alone["budget_tokens"] <= steps * 32 * 4096


def test_memory_has_a_row_per_stage_and_a_limit(run, tmp_path):
    path = tmp_path / "x.json"
    arguments = ("--data.micro_batch_size", 1, "--world_size", 4, "--parallel.pipeline", 4, "--json", path)
    code, out, _ = run(preset("7b"), *arguments, "--parallel.memory_gib", 40)
    assert code == 2
    stages = json.loads(path.read_text())["cost"]["stages"]
    lines = [line.split() for line in out.splitlines()]
    header = next(index for index, words in enumerate(lines) if words[:2] == ["stage", "weights"])
    rows = lines[header + 1 : header + 5]
    assert [row[-2] for row in rows] == [f"{stage['device_bytes'] / 2**30:.2f}" for stage in stages]
    assert [stage["logits_bytes"] > 0 for stage in stages] == [False, False, False, True]
    code, _, err = run(preset("7b"), *arguments, "--parallel.memory_gib", 1000)
    assert (code, "error" in err) == (0, False)


def test_one_row_per_matrix(run):
    _, out, _ = run(preset("3m"), "--tensor-level", "--model.attention_gate", "none")
    assert out.count("self_attn.q_proj.weight") == 6
    assert "self_attn.gate_proj.weight" not in out
    assert "model.layers.5.mlp.down_proj.weight" in out


def test_comparison_has_a_column_per_scheme(run):
    _, out, _ = run(preset("17m"), "--compare", "--init.scheme", "megatron")
    header = next(line for line in out.splitlines() if line.startswith("target std"))
    for name in ("this config", "gamma 1", "gamma 0.5", "fixed 0.02", "fixed_depth", "deepseek", "inverse_sqrt",
                 "megatron", "neox_small"):  # fmt: skip
        assert name in header


# Errors: one line, exit code 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--init.gama", "1"), "init.gama is not an option: did you mean init.gamma?"),
        (("--config=nowhere.yaml",), "--config nowhere.yaml: there is no such file"),
        (("--parallel.tensor", "3", "--world_size", "3"), "parallel.tensor=3 must divide model.num_query_groups=2"),
        (("--parallel.tensor", "2", "--world_size", "3"), "must divide the number of processes, 3"),
        (("--world_size", "0"), "world_size=0 must be at least 1"),
        (("--init.gamma", "9"), "init.gamma=9.0 must lie between 0 and 4"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    code, out, err = run(preset("17m"), "--model.vocab_size", 4096, *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_file_that_cannot_be_written_is_one_line_too(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(preset("1m"), "--model.vocab_size", 512, "--json", tmp_path / "file" / "x.json")
    assert code == 2
    assert err.startswith("error: ")


# The sample


def tiny(**init):
    config = Config(init=InitConfig(**init))
    config.model.vocab_size = 384
    resolve_model(config.model)
    return config


def by_role(rows):
    return {row.report.role: row for row in rows}


def test_the_sample_is_what_a_run_draws():
    """With room for everything, the sample of the first and last layer is their whole matrices."""
    config = tiny()
    report = by_role(sample_rows(config, elements=1 << 22))["mlp_up"].report
    values = []
    for layer in (0, 3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        out = torch.empty(704, 256)
        values.append(normal_(out, seed=config.run.seed, name=name, global_shape=(704, 256), std=1 / 256))
    drawn = torch.stack(values).double()
    assert report.count == drawn.numel()
    assert report.measured_mean == pytest.approx(drawn.mean().item(), rel=1e-6)
    assert report.measured_std == pytest.approx(drawn.std(correction=0).item(), rel=1e-9)


def test_a_single_matrix_is_not_drawn_twice():
    rows = by_role(sample_rows(tiny(), elements=1 << 22))
    assert rows["embedding"].report.count == 384 * 256
    rows = by_role(sample_rows(tiny(), elements=1 << 14))
    assert rows["embedding"].report.count == 1 << 14
    assert all(row.report.count <= 1 << 14 for row in rows.values())


def test_rows_stand_for_all_matrices():
    rows = by_role(sample_rows(tiny(), elements=1 << 12))
    assert rows["query"].report.name == "4 x query"
    assert rows["query"].matrices == 4
    assert rows["head"].matrices == 1
    assert len(sample_rows(tiny(), by_matrix=True, elements=1 << 12)) == 4 * 8 + 2


@pytest.mark.parametrize(
    ("init", "gamma"),
    [({"gamma": 0.7}, 0.7), ({"scheme": "inverse_sqrt"}, 0.5), ({"scheme": "fixed"}, None)],
)
def test_target_gamma(init, gamma):
    assert {row.gamma for row in sample_rows(tiny(**init), elements=1 << 10)} == {gamma}


def test_truncated_draws_are_measured_as_such():
    rows = sample_rows(tiny(distribution="truncated", truncate_at=1.0), elements=1 << 18)
    assert all(abs(row.report.z) < 5 for row in rows)


def test_a_wrong_sample_is_seen(monkeypatch):
    """Negative control: a drawing that is 3 % off shows in every z."""
    right = inspection._draw
    monkeypatch.setattr(
        inspection,
        "_draw",
        lambda part, config: (
            (m := right(part, config)) and WeightStatistics(m.count, m.total * 1.03, m.square * 1.03**2)
        ),
    )
    assert all(row.report.z > 6 for row in sample_rows(tiny(), elements=1 << 18))


def test_comparison_leaves_the_config_alone():
    config = tiny(gamma=1.0, exponents={"query": 0.25})
    found = compare_schemes(config)
    assert found["query"]["this config"] == pytest.approx(256**-0.25)
    assert found["query"]["gamma 1"] == pytest.approx(1 / 256)
    assert found["key"]["fixed 0.02"] == 0.02
    assert found["mlp_down"]["megatron"] == pytest.approx(0.02 / math.sqrt(8))
    assert config.init == InitConfig(gamma=1.0, exponents={"query": 0.25})
