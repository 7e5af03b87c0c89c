"""Where a run comes from: versions, source, hosts, layout."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

from megagamma.config.schema import Config
from megagamma.distributed.runtime import Runtime

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy", "wandb")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        found = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def provenance(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Content of provenance.json. A collective: every rank tells its host and device."""
    import torch

    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else platform.processor()
    places = runtime.gather(
        {"rank": runtime.rank, "host": runtime.host, "device": str(runtime.device), "name": device or "cpu"}
    )
    parallel = config.parallel
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "layout": {
            "world": runtime.size,
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "data": runtime.data_size,
            "sequence": parallel.sequence,
        },
        "threads": runtime.threads,
        "ranks": places,
    }
