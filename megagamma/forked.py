"""Runs started without the seconds that imports cost: forked from a server that has imported everything once.

The ranks are what a launcher starts, without the launcher: one that survives another must end by itself. They end, with a
checkpoint, when the process that launched them is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from megagamma.errors import DistributedError

# Variables of other launchers, which would say who the process is.
_LAUNCHERS = (
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
)


def free_port() -> int:
    """A port that nobody listens on now, below those that systems give to outgoing connections, one of which could take it."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise DistributedError("no free port: 100 ports between 20000 and 32000 are in use: end what listens on them")


def context() -> ForkServerContext:
    """A context whose server has a run's imports done; nothing in them starts a thread."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["megagamma.preloaded", "deepspeed", "megagamma.job"])
    return found


def _end_with(lifeline: Connection) -> None:
    """Ask for SIGTERM when the other end of a pipe is gone, which the process that launched this one holds.

    The server that this one was forked from says nothing: it lives on for as long as any that it has forked.
    """

    def wait() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _main(
    lifeline: Connection,
    environment: Mapping[str, str],
    arguments: Sequence[str],
    log: Path,
    folder: Path,
    prepare: Callable[[int], None] | None,
) -> None:
    _end_with(lifeline)
    for name in _LAUNCHERS:
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["pretrain.py", *arguments]
    from megagamma.cli import main_guard

    # By its name: it stands above everything, and nothing imports it.
    main = importlib.import_module("megagamma.pretrain").main
    if prepare is not None:
        prepare(int(environment["RANK"]))
    code = main_guard(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(
    size: int,
    arguments: Sequence[str],
    log: Path,
    folder: Path,
    prepare: Callable[[int], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[BaseProcess]:
    """Start `megagamma pretrain` with these arguments on `size` ranks of this host.

    Args:
        log: file that everything they print is appended to.
        folder: working directory.
        prepare: importable function, called with the rank in every process before it begins: to inject a fault.
        environment: further variables.
    """
    port = free_port()
    start = context()
    theirs, ours = start.Pipe(duplex=False)
    found: list[BaseProcess] = []
    for rank in range(size):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {}),
        }  # fmt: skip
        words = (theirs, variables, list(arguments), log, folder, prepare)
        process = start.Process(target=_main, args=words, daemon=True)
        process.start()
        # Held for as long as the process is known here.
        process.lifeline = ours  # type: ignore[attr-defined]
        found.append(process)
    theirs.close()
    return found
