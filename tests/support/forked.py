"""Runs of the smoke config on a few ranks, see `megagamma.testing.forked`."""

from __future__ import annotations

from multiprocessing.process import BaseProcess
from pathlib import Path

from megagamma.testing import forked
from megagamma.testing.ranks import context

__all__ = ["context", "launch"]
from support.processes import ROOT, SMOKE


def launch(size: int, arguments: list[str], log: Path) -> list[BaseProcess]:
    """Start `megagamma/pretrain.py` with these arguments on `size` ranks; what they say goes to the file `log`."""
    return forked.launch(size, [*SMOKE, *arguments], log, ROOT)
