"""Whole runs on a few ranks without the seconds that imports cost: forked from a server that has imported everything.

The ranks are what a launcher starts, without the launcher: one that survives another must end by itself.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from megagamma.testing.ranks import context, free_port


def _main(
    rank: int,
    size: int,
    port: int,
    arguments: Sequence[str],
    log: Path,
    folder: Path,
    prepare: Callable[[int], None] | None,
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["pretrain.py", *arguments]
    from megagamma.cli import main_guard

    # By its name: it stands above everything, and nothing imports it.
    main = importlib.import_module("megagamma.pretrain").main
    if prepare is not None:
        prepare(rank)
    code = main_guard(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(
    size: int, arguments: Sequence[str], log: Path, folder: Path, prepare: Callable[[int], None] | None = None
) -> list[BaseProcess]:
    """Start `megagamma pretrain` with these arguments on `size` ranks.

    Args:
        log: file that everything they print is appended to.
        folder: working directory.
        prepare: importable function, called with the rank in every process before it begins: to inject a fault.
    """
    port = free_port()
    found: list[BaseProcess] = []
    for rank in range(size):
        process = context().Process(
            target=_main, args=(rank, size, port, list(arguments), log, folder, prepare), daemon=True
        )
        process.start()
        found.append(process)
    return found
