"""Whole runs on a few ranks without the seconds that imports cost: forked from a server that has imported everything.

The ranks are what a launcher starts, without the launcher: one that survives another must end by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from support.processes import ROOT, SMOKE
from support.ranks import free_port


def context() -> ForkServerContext:
    """A context whose server has the project's imports done; nothing in them starts a thread."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torch", "deepspeed", "megagamma.training.loop", "megagamma.training.setup"])
    return found


def _main(rank: int, size: int, port: int, arguments: list[str], log: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    os.chdir(ROOT)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["pretrain.py", *SMOKE, *arguments]
    from megagamma.cli import main_guard
    from megagamma.pretrain import main

    code = main_guard(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(size: int, arguments: list[str], log: Path) -> list[BaseProcess]:
    """Start `megagamma/pretrain.py` with these arguments on `size` ranks; what they say goes to the file `log`."""
    port, found = free_port(), []
    for rank in range(size):
        process = context().Process(target=_main, args=(rank, size, port, arguments, log), daemon=True)
        process.start()
        found.append(process)
    return found
