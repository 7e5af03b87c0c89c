"""A wheel trains by itself: built from the tree, installed in a folder, used from an empty one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TINY = [
    *("--data.corpus", "tiny", "--run.steps", "2", "--run.device", "cpu", "--run.folder", "runs/tiny"),
    *("--model.hidden_size", "32", "--model.num_layers", "2", "--model.num_attention_heads", "2"),
    *("--data.sequence_length", "32", "--data.global_batch_size", "4", "--data.micro_batch_size", "4"),
    *("--validation.windows", "4", "--logging.sample_tokens", "4", "--logging.wandb", "disabled"),
]


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes beside the source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    shutil.copytree(root / "megagamma", source / "megagamma", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder that holds the package and nothing else."""
    folder = wheel.parent / "site"
    pip("install", wheel, "--no-deps", "--no-index", "--target", folder)
    return folder


def run(installed: Path, folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder outside the source tree, which it cannot see."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {**inherited, "PYTHONPATH": str(installed)}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.launcher
def test_the_wheel_holds_every_file_of_the_package(wheel: Path, root: Path) -> None:
    files = {path for path in (root / "megagamma").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(root)) for path in files} <= names
    assert not [name for name in names if name.startswith(("tests", "tools", "configs"))]


@pytest.mark.launcher
def test_an_installed_wheel_trains_outside_the_tree(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import megagamma; print(megagamma.__file__)")
    assert Path(where.stdout.strip()) == installed / "megagamma" / "__init__.py"
    trained = run(installed, tmp_path, "-m", "megagamma.commands", "pretrain", *TINY)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert (tmp_path / "runs" / "tiny" / "config.yaml").read_text().count("deepspeed_config: auto") == 1
    # The console script.
    script = installed / "bin" / "megagamma"
    checked = run(installed, tmp_path, script, "checkpoint", "verify", "runs/tiny")
    assert checked.returncode == 0, checked.stderr
    assert "newest valid checkpoint: runs/tiny/checkpoints/step_00000002" in checked.stdout
    # What needs the source tree says so.
    refused = run(installed, tmp_path, script, "demo")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: this command needs configs/ of the source tree")
