"""Where a run comes from: versions, source, hosts, layout."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

from megagamma.config.schema import ParallelConfig

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy", "wandb")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str | None]:
    """Version of each package that a run depends on; None where it is not installed."""
    return {package: _version(package) for package in PACKAGES}


def _git(*arguments: str) -> str | None:
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        found = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def source_commit() -> str | None:
    """Commit of the source tree, with a + where files differ from it; None outside of a checkout."""
    commit = _git("rev-parse", "HEAD")
    return commit and commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def provenance(
    parallel: ParallelConfig, data_parallel_size: int, threads: int, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """Content of provenance.json.

    Args:
        parallel: sizes of the other kinds of parallelism.
        data_parallel_size: number of copies of the model.
        threads: CPU threads of a process.
        ranks: of every process, in order: rank, host, device and the device's name.
    """
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": installed_versions(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "layout": {
            "world": len(ranks),
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "data": data_parallel_size,
            "sequence": parallel.sequence,
        },
        "threads": threads,
        "ranks": ranks,
    }
