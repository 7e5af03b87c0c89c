"""A pool of real processes in one gloo world, each running functions that it is sent.

Importing torch, DeepSpeed and Megatron takes seconds per process, so the processes live for a whole session.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, size: int, port: int, path: list[str], pipe: Connection) -> None:
    sys.path[:] = path
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        if message is None:
            return
        function, arguments = message
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # noqa: BLE001 - sent to the test
            pipe.send((False, traceback.format_exc()))


class RankPool:
    """`size` processes; `run` calls one function on all of them at once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, sys.path, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 240) -> list[Any]:
        """Call `function(*arguments)` on every rank; returns the results by rank.

        Raises:
            AssertionError: a rank raised, died or took longer than `seconds`. The pool is started anew then, since the
                others may wait for it in a collective.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            problem = None
            if not pipe.poll(seconds):
                problem = f"rank {rank} gave no answer in {seconds} s"
            else:
                try:
                    fine, value = pipe.recv()
                    problem = None if fine else f"rank {rank} raised:\n{value}"
                except EOFError:
                    problem = f"rank {rank} died"
            if problem:
                self.close()
                self._start()
                raise AssertionError(problem)
            results.append(value)
        return results

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
