"""What a user sees of a failure: one line and an exit code, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagamma.cli import main_guard
from megagamma.environment import world_size
from megagamma.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    DistributedError,
    InitializationError,
    MegagammaError,
    TrainingError,
)

ERRORS = [MegagammaError, ConfigurationError, DataError, CheckpointError, InitializationError, DistributedError]


def raising(error: BaseException) -> Any:
    def function() -> int:
        raise error

    return function


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kind", ERRORS)
def test_error_is_one_line_and_code_2(kind: type[MegagammaError], capsys: pytest.CaptureFixture[str]) -> None:
    assert main_guard(raising(kind("option=3 must be 4: use 4"))) == 2
    assert capsys.readouterr() == ("", "error: option=3 must be 4: use 4\n")


def test_guard_has_its_own_code() -> None:
    assert main_guard(raising(TrainingError("loss"))) == 3


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (75, 75)])
def test_result_is_the_code(result: int | None, code: int) -> None:
    assert main_guard(lambda: result) == code


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_guard(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_our_own_faults_end_in_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no user can fix must not be dressed up as advice; its traceback is in a file."""
    monkeypatch.chdir(tmp_path)
    assert main_guard(raising(ZeroDivisionError("by zero"))) == 70
    said = capsys.readouterr().err
    (report,) = tmp_path.glob("crash-*-rank0.txt")
    assert said == f"error: not foreseen: ZeroDivisionError: by zero: the report is {report.name}\n"
    assert "Traceback" in report.read_text()


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_speaks_of_what_all_meet(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "0")
    main_guard(raising(DataError("missing")))
    assert capsys.readouterr().err == "error: missing\n"
    monkeypatch.setenv(variable, "1")
    assert main_guard(raising(DataError("missing"))) == 2
    assert capsys.readouterr().err == ""


def test_rank_speaks_of_what_it_alone_meets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    error = CheckpointError("disk full")
    error.on_one_rank = True
    assert main_guard(raising(error)) == 2
    assert capsys.readouterr().err == "error: rank 3: disk full\n"


def test_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world_size() == 1
    # Inside an allocation but not started by srun: one process.
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert world_size() == 1
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert world_size() == 8
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_size() == 4


def pretrain(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The main job as a user starts it."""
    command = [sys.executable, str(root / "megagamma" / "pretrain.py"), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        command, cwd=root, env={**inherited, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.hiden_size", "3"], "error: model.hiden_size is not an option: did you mean model.hidden_size?"),
        (["--model.num_query_groups", "3"], "error: model.num_query_groups=3 must divide model.num_attention_heads=4"),
        (["--config", "missing.yaml"], "error: --config missing.yaml: there is no such file"),
        (["--parallel.memory_gib", "0.01"], "error: parallel.memory_gib=0.01: a rank of pipeline stage 0 needs"),
    ],
)
def test_wrong_command_line(root: Path, arguments: list[str], said: str) -> None:
    found = pretrain(root, "--config", "configs/smoke.yaml", *arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(said)
    assert found.stderr.count("\n") == 1


def test_rules_know_the_launchers_processes(root: Path) -> None:
    found = pretrain(root, "--config", "configs/smoke.yaml", "--data.global_batch_size", "8", WORLD_SIZE="3")
    assert found.returncode == 2
    assert "3 data-parallel ranks" in found.stderr


def test_reader_that_has_seen_enough(root: Path) -> None:
    """`pretrain.py --print_config | head -1` ends without a complaint."""
    command = f"{sys.executable} megagamma/pretrain.py --config configs/smoke.yaml --print_config | head -1"
    found = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (found.stdout, found.stderr) == ("run:\n", "")


def test_our_folders_hide_no_package(root: Path) -> None:
    """Python looks first beside a script: there `import training` would find megagamma/training."""
    code = (
        "import os, runpy, sys\n"
        "sys.argv, sys.path[0] = ['pretrain.py', '--help'], os.path.abspath('megagamma')\n"
        "import importlib.util\n"
        "print('BEFORE', importlib.util.find_spec('training') is not None)\n"
        "try:\n    runpy.run_path('megagamma/pretrain.py', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "print('AFTER', importlib.util.find_spec('training') is not None)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert "BEFORE True" in found.stdout
    assert "AFTER False" in found.stdout
