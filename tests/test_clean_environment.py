"""The package as it is installed, with torch and numpy alone beside it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# torch, numpy, and what torch itself needs.
PRESENT = (
    "torch", "torchgen", "functorch", "numpy", "numpy.libs", "typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "filelock", "fsspec", "nvidia", "triton", "isympy.py", "torch.libs", "setuptools",
)  # fmt: skip
PROGRAM = """
import torch
from torch import nn
import megagamma
model = nn.ModuleDict({"embed": nn.Embedding(50, 16), "head": nn.Linear(16, 50, bias=False)})
report = megagamma.initialize(model, gamma=1.0, roles={"embed.weight": "embedding", "head.weight": "head"}, num_layers=1)
report.check()
print(report.table())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders that such an environment would find packages in: the built wheel's, and one of links to torch and numpy."""
    own, others, wheels = (tmp_path_factory.mktemp(name) for name in ("own", "others", "wheels"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run(command, check=True, timeout=300, cwd=wheels)
    (wheel,) = wheels.glob("megagamma-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(own), str(wheel)], check=True, timeout=300)
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    site = Path(spec.origin).parents[1]
    for name in PRESENT:
        if (site / name).exists():
            (others / name).symlink_to(site / name)
    return [str(own), str(others)]


def python(installed: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Python that sees nothing but its own library and those folders."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(installed)}
    return subprocess.run(
        [sys.executable, "-S", *words], capture_output=True, text=True, env=environment, timeout=120, cwd=installed[0]
    )


@pytest.mark.launcher
def test_the_two_lines(installed: list[str]) -> None:
    found = python(installed, "-c", PROGRAM)
    assert found.returncode == 0, found.stderr
    assert "1 x embedding" in found.stdout
    for name in ("megatron", "deepspeed", "transformers", "yaml"):
        missing = python(installed, "-c", f"import {name}")
        assert missing.returncode == 1 and "ModuleNotFoundError" in missing.stderr, "not such an environment"


@pytest.mark.launcher
def test_what_needs_more_says_what(installed: list[str]) -> None:
    found = python(installed, "-m", "megagamma.commands", "inspect_init")
    assert found.returncode == 2 and "pip install 'megagamma[train]'" in found.stderr, found.stderr
    assert len(found.stderr.splitlines()) == 1
    found = python(installed, "-c", "import megagamma; megagamma.patched_initialization().__enter__()")
    assert "No module named 'megatron'" in found.stderr
