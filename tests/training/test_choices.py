"""What `auto` becomes: of the dtype by features and a measurement, of compiling by what it saves; and that it stays."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.ranks import RankPool
from support.sweeps import write
from support.train import run_trainer

from megagamma.config import resolve
from megagamma.config.io import parse_config
from megagamma.config.schema import Config
from megagamma.errors import ConfigurationError
from megagamma.model.regions import Region
from megagamma.scaling import registration
from megagamma.scaling.points import expand
from megagamma.scaling.spec import read_sweep
from megagamma.training import choices
from megagamma.training.choices import Choices, choose, choose_for_sweep, compiler_problem, products_ratio

MODEL = (
    "--data.corpus=tiny", "--model.vocab_size=512", "--model.hidden_size=32", "--data.sequence_length=32", "--run.steps=20",
    "--init.gamma=0.5",
)  # fmt: skip


def config_of(*arguments: str) -> Config:
    return parse_config([*MODEL, *arguments])


def rank(device: str = "cpu", size: int = 1) -> Any:
    """What `choose` needs of a runtime, of one process."""
    return SimpleNamespace(
        device=torch.device(device), data_size=size, gather=lambda value: [value], run_on_rank0=lambda action: action()
    )


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CPU with bf16 instructions that multiplies eight times as fast with them; too short a run to compile."""
    monkeypatch.setattr(resolve, "has_fast_bf16", lambda: True)
    monkeypatch.setattr(choices, "has_fast_bf16", lambda: True)
    monkeypatch.setattr(choices, "products_ratio", lambda config: 8.0)
    return monkeypatch


def test_dtype_on_a_cpu(fast: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = choose(config_of(), rank())
    assert found.dtype == torch.bfloat16 and "8.0 x as fast in bf16" in found.lines[0]
    # As other ways to ask for it, or to forbid it.
    assert choose(config_of("--precision.dtype", "fp32"), rank()) == Choices(torch.float32, False)
    no_masters = tmp_path / "zero0.json"
    no_masters.write_text('{"zero_optimization": {"stage": 0}}')
    assert choose(config_of("--deepspeed_config", str(no_masters)), rank()).dtype == torch.float32
    # A model that is too small for it, and a CPU without it.
    fast.setattr(choices, "products_ratio", lambda config: 1.2)
    small = choose(config_of(), rank())
    assert small.dtype == torch.float32 and "1.2 x" in small.lines[0] and "pays from 2.5 x" in small.lines[0]
    assert choose(config_of("--precision.dtype", "bf16"), rank()) == Choices(torch.bfloat16, False)
    fast.setattr(choices, "products_ratio", lambda config: 0.4)
    assert "use fp32" in choose(config_of("--precision.dtype", "bf16"), rank()).lines[0]
    fast.setattr(resolve, "has_fast_bf16", lambda: False)
    assert choose(config_of(), rank()) == Choices(torch.float32, False)


def test_small_weights_stay_in_fp32(fast: pytest.MonkeyPatch) -> None:
    for small in (("--init.gamma", "1"), ("--init.query", "0.6")):
        found = choose(config_of(*small), rank())
        assert found.dtype == torch.float32 and "not shown to be as good" in found.lines[0]
        assert choose(config_of(*small, "--precision.dtype", "bf16"), rank()).dtype == torch.bfloat16
        fast.setattr(choices, "has_fast_bf16", lambda: False)
        assert choose(config_of(*small), rank()).lines == (), "no news on a CPU where it would be fp32 anyhow"
        fast.setattr(choices, "has_fast_bf16", lambda: True)
    # Another scheme has no gamma.
    assert choose(config_of("--init.gamma", "1", "--init.scheme", "fixed"), rank()).dtype == torch.bfloat16


def test_arms_of_a_sweep_have_one_dtype(fast: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def chosen(**changes: Any) -> dict[str, str]:
        path = write(tmp_path, rules={}, seeds=[1], set={"precision.dtype": "auto"}, **changes)
        return registration._choices(expand(read_sweep(path), tmp_path), choose_for_sweep)

    assert chosen(axes={"init.gamma": [0.5]})["dtype"] == "bf16"
    assert chosen(axes={"init.gamma": [0.5, 1.0]})["dtype"] == "fp32"


def test_a_resume_keeps_what_was_chosen(fast: pytest.MonkeyPatch) -> None:
    kept = {"dtype": "float32", "compiled": True}
    assert choose(config_of(), rank(), kept) == Choices(torch.float32, True)
    assert choose(config_of("--precision.dtype", "bf16", "--run.compile", "off"), rank(), kept) == Choices(
        torch.bfloat16, False
    )
    assert choose(config_of(), rank(), {}).dtype == torch.bfloat16, "a run of an earlier version says nothing"


def test_compiling(fast: pytest.MonkeyPatch) -> None:
    """By seconds of a pass as they are told here: eager 20 ms; compiled 5 ms; the compiler itself is not started."""
    fast.setattr(Region, "kernel", property(lambda self: "compiled"))
    seconds = {"compiled": 0.005}
    fast.setattr(choices, "_pass", lambda function, inputs: seconds.get(function, 0.02))
    fast.setattr(choices, "compiler_problem", lambda device: "")
    long = ("--run.steps", "100000")
    found = choose(config_of(*long), rank())
    assert found.compiled and "on: whole layers save 15.00 ms" in found.lines[1]
    found = choose(config_of(*long, "--model.recompute", "selective"), rank())
    assert found.compiled and "on: norms and SwiGLU save 45.00 ms" in found.lines[1]
    assert not choose(config_of("--run.steps", "10"), rank()).compiled, "over before it pays"
    assert not choose(config_of(*long, "--run.compile", "off"), rank()).compiled
    assert choose(config_of("--run.steps", "1", "--run.compile", "on"), rank()).compiled
    seconds["compiled"] = 0.03  # slower
    assert not choose(config_of(*long), rank()).compiled
    # Without a compiler: off with one line, and an error where it is asked for.
    fast.setattr(choices, "compiler_problem", lambda device: "this host has no C++ compiler")
    found = choose(config_of(*long), rank())
    assert not found.compiled and found.lines[1] == "run.compile: off: this host has no C++ compiler"
    with pytest.raises(ConfigurationError, match=r"run\.compile=on: this host has no C\+\+ compiler: install"):
        choose(config_of("--run.compile", "on"), rank())
    assert not choose(config_of(*long), rank(), {"compiled": True}).compiled, "a resume on a host without one"


def test_a_compiler_that_fails_is_no_end(fast: pytest.MonkeyPatch) -> None:
    def fail(self: Region) -> None:
        raise RuntimeError("Python.h: no such file\nand more")

    fast.setattr(Region, "kernel", property(fail))
    fast.setattr(choices, "_pass", lambda function, inputs: 0.02)
    fast.setattr(choices, "compiler_problem", lambda device: "")
    found = choose(config_of("--run.steps", "100000"), rank())
    assert not found.compiled and found.lines[1] == "run.compile: off: the compiler failed: Python.h: no such file"


def test_what_a_host_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(choices.shutil, "which", lambda name: name if name == "g++" else None)
    monkeypatch.setattr(choices.sysconfig, "get_path", lambda name: str(tmp_path))
    assert compiler_problem(cpu) == f"this host lacks Python's headers ({tmp_path}/Python.h)"
    (tmp_path / "Python.h").touch()
    assert compiler_problem(cpu) == ""
    monkeypatch.setattr(choices.shutil, "which", lambda name: None)
    assert compiler_problem(cpu) == "this host has no C++ compiler"


@pytest.mark.skipif(compiler_problem(torch.device("cpu")) != "", reason="no C++ compiler")
@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_what_is_measured_is_a_layer_of_the_model(monkeypatch: pytest.MonkeyPatch, gate: str) -> None:
    """Its function takes the tensors that are made for it; only the eager one is run here."""
    monkeypatch.setattr(Region, "kernel", property(lambda self: self.eager))
    monkeypatch.setattr(choices, "_SHORT", 0.0)
    found = choose(config_of("--run.steps", "1000", "--model.attention_gate", gate), rank())
    assert "whole layers save" in found.lines[-1]


def test_measured_here() -> None:
    """The real measurement: a ratio of two times that are there."""
    assert 0.01 < products_ratio(config_of("--model.ffn_hidden_size", "512")) < 1000
    before = torch.get_num_threads()
    found = choose_for_sweep(config_of("--precision.dtype", "fp32"), 1)
    assert found == {"dtype": "fp32", "compile": "off"} and torch.get_num_threads() == before


def test_a_run_says_and_obeys_what_it_chose(one_rank: RankPool, data_cache: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    base = ["--data.cache", data_cache, "--run.folder", str(folder), "--precision.dtype", "auto"]
    assert one_rank.run(run_trainer, [*base, "--run.steps", "2"]) == [0]
    resolved = json.loads((folder / "resolved.json").read_text())
    assert resolved["compiled"] is False
    # As if it had been started on another kind of CPU: the one at hand has no say.
    other = "float32" if resolved["dtype"] == "bfloat16" else "bfloat16"
    (folder / "resolved.json").write_text(json.dumps({**resolved, "dtype": other}))
    assert one_rank.run(run_trainer, [*base, "--run.steps", "3"]) == [0]
    assert json.loads((folder / "resolved.json").read_text())["dtype"] == other
