"""provenance.json says which versions, which source and which machines a run was made with."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from megagamma.config.schema import ParallelConfig
from megagamma.runs.provenance import PACKAGES, installed_versions, provenance

RANKS = [{"rank": rank, "host": f"node{rank // 2}", "device": "cpu", "name": "x"} for rank in range(4)]


def test_versions_are_those_of_the_imported_packages() -> None:
    versions = installed_versions()
    assert tuple(versions) == PACKAGES
    assert versions["torch"] == torch.__version__ and versions["numpy"] == numpy.__version__


def test_a_package_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagamma.runs.provenance.PACKAGES", ("torch", "no-such-package-anywhere"))
    assert installed_versions() == {"torch": torch.__version__, "no-such-package-anywhere": None}


def test_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--model.num_layers", "2"])
    found = provenance(ParallelConfig(tensor=2, sequence=True), data_parallel_size=2, threads=3, ranks=RANKS)
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == ["pretrain.py", "--model.num_layers", "2"]
    assert found["python"] == platform.python_version()
    assert found["layout"] == {"world": 4, "tensor": 2, "pipeline": 1, "data": 2, "sequence": True}
    assert (found["threads"], found["ranks"]) == (3, RANKS)


def test_commit_of_the_source(root: Path) -> None:
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("the source is not under git here")
    found = provenance(ParallelConfig(), 1, 1, [])
    assert found["git_commit"] == done.stdout.strip()
    changes = subprocess.check_output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    assert found["git_changed"] is bool(changes)


def test_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = provenance(ParallelConfig(), 1, 1, [])
    assert (found["git_commit"], found["git_changed"]) == (None, False)
