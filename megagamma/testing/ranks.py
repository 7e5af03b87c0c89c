"""A pool of real processes on this machine in one gloo world, each running functions that it is sent.

For tests and studies of layouts: importing torch, DeepSpeed and Megatron takes seconds, so the processes live for many
calls, and are forked from a server that has imported everything.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from megagamma.cli import ignore_library_warnings
from megagamma.forked import context, free_port


class RankError(RuntimeError):
    """A rank of the pool raised, died or gave no answer; the message holds its traceback."""


def _serve(rank: int, size: int, port: int, path: list[str], pipe: Connection) -> None:
    sys.path[:] = path
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    ignore_library_warnings()
    import torch

    from megagamma.distributed.compat.megatron import preload

    torch.set_num_threads(1)
    preload()
    # What is imported stays: the collections below need not go through it.
    gc.freeze()
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
        except BaseException:  # noqa: BLE001 - sent to the caller
            pipe.send((False, traceback.format_exc()))
        # Engines are cyclic garbage that keeps process groups, each with threads of its own.
        del message, function, arguments
        gc.collect()


class RankPool:
    """`size` processes; `run` calls one function on all of them at once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        start = context()
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(self.size):
            ours, theirs = start.Pipe()
            process = start.Process(target=_serve, args=(rank, self.size, port, sys.path, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 240) -> list[Any]:
        """Call `function(*arguments)` on every rank; returns the results by rank.

        Args:
            function: importable in the ranks; so are its arguments' and results' types.
            seconds: deadline for each rank's answer.

        Raises:
            RankError: a rank raised, died or took longer than `seconds`. The pool is started anew then, since the
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
                raise RankError(problem)
            results.append(value)
        return results

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
