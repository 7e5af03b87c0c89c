"""Whole runs on a few ranks for tests, see `megagamma.forked`: with one thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from megagamma import forked
from megagamma.forked import context

__all__ = ["context", "launch"]


def launch(
    size: int, arguments: Sequence[str], log: Path, folder: Path, prepare: Callable[[int], None] | None = None
) -> list[BaseProcess]:
    """Start `megagamma pretrain`, see `megagamma.forked.launch`."""
    return forked.launch(size, arguments, log, folder, prepare, {"OMP_NUM_THREADS": "1"})
