"""Where a run comes from: versions, source, hosts, layout."""

from __future__ import annotations

import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from megagamma.config.schema import ParallelConfig
from megagamma.source import Source, source_of

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy", "wandb")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str | None]:
    """Version of each package that a run depends on; None where it is not installed."""
    return {package: _version(package) for package in PACKAGES}


def _source() -> Source:
    return source_of(Path(__file__).resolve().parents[2])


def source_commit() -> str | None:
    """Commit of the source tree, or of the checkout that it is a copy of, with a + where files differ from it; None outside
    of both."""
    return str(_source()) or None


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
    source = _source()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": installed_versions(),
        "git_commit": source.commit,
        "git_changed": source.is_changed,
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
