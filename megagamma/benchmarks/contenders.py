"""Contenders of a benchmark: each in a process of its own, or in several ranks, and all in turns.

A process of its own gives each the allocator and the OpenMP settings that it has in use; taking turns gives all the same
share of a noisy machine.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from megagamma.errors import MegagammaError
from megagamma.forked import free_port

Step = Callable[[], float | None]
"""What is measured: its seconds, or the number that it returns."""
Make = Callable[..., tuple[Step, dict[str, Any]]]
"""(step, facts) of a contender, made in its process."""
_WARM_UP = 3  # steps; the first compiles
_TURN = 0.5  # seconds


def _work(
    connection: Connection, variables: Mapping[str, str], sleeping_threads: bool, make: Make, arguments: Sequence[Any]
) -> None:
    from megagamma.cli import ignore_library_warnings
    from megagamma.environment import choose_threads, let_waiting_threads_sleep

    os.environ.update(variables)
    if sleeping_threads:
        let_waiting_threads_sleep()  # before torch is imported
    ignore_library_warnings()
    import torch

    from megagamma.planning.drawing import resident_bytes

    torch.set_num_threads(choose_threads(0, 1))
    begin = time.perf_counter()
    step, facts = make(*arguments)
    for _ in range(_WARM_UP):
        step()
    connection.send(
        {**facts, "start_seconds": time.perf_counter() - begin, "peak_bytes": resident_bytes("VmHWM")},
    )
    while (count := connection.recv()) is not None:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            measured = step()
            seconds.append(time.perf_counter() - begin if measured is None else measured)
        connection.send(seconds)


def _variables(ranks: int) -> list[dict[str, str]]:
    """What a launcher sets for each process of a run on this host; one process keeps the variables of this one."""
    if ranks == 1:
        return [{}]
    port = str(free_port())
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }
        for rank in range(ranks)
    ]  # fmt: skip


class Contender:
    """A process, or the processes of several ranks, that make steps when they are told to."""

    def __init__(self, name: str, make: Make, *arguments: Any, ranks: int = 1, sleeping_threads: bool = False) -> None:
        """Start it, and wait for its first steps.

        Args:
            name: for messages.
            make: see `Make`; a module's function.
            arguments: of `make`.
            ranks: processes; of several each has one thread, and the variables of a launcher.
            sleeping_threads: set up OpenMP as a run of ours does.

        Raises:
            MegagammaError: it ended by itself; what it said is on the console.
        """
        self.name = name
        start = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for variables in _variables(ranks):
            ours, theirs = multiprocessing.Pipe()
            process = start.Process(
                target=_work, args=(theirs, variables, sleeping_threads, make, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        answers = self._receive()
        self.facts: dict[str, Any] = answers[0]
        """Of `make`, the seconds until the warm-up was over, and then the peak of resident memory (unit: bytes). Of the
        first rank, but for the peak, which is the largest."""
        self.facts["peak_bytes"] = max(answer["peak_bytes"] for answer in answers)

    def _receive(self) -> list[Any]:
        """What each process answers, by rank."""
        answers: dict[Any, Any] = {}
        while len(answers) < len(self._ends):
            for end in wait([end for end in self._ends if end not in answers]):
                try:
                    answers[end] = end.recv()  # type: ignore[union-attr,call-arg]
                except EOFError:
                    self._give_up(self._processes[self._ends.index(end)])  # type: ignore[arg-type]
        return [answers[end] for end in self._ends]

    def _give_up(self, process: BaseProcess) -> NoReturn:
        """One has ended: end the others, which may wait for it, and name it."""
        process.join()
        for other in self._processes:
            other.kill()
        raise MegagammaError(f"benchmark: {self.name} ended with exit code {process.exitcode}; what it said is above")

    def run(self, steps: int) -> list[float]:
        """What is measured of each of some steps, see `Step`; of several ranks the largest."""
        for end in self._ends:
            end.send(steps)
        return [max(seconds) for seconds in zip(*self._receive(), strict=True)]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join()


def in_turns(contenders: Sequence[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each contender, by name, from turns of about half a second; a round before them is not counted."""
    counts = {contender.name: max(1, min(50, round(_TURN / contender.run(1)[0]))) for contender in contenders}
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            times[contender.name] += contender.run(counts[contender.name])
    return times


def speeds(times: Mapping[str, Sequence[float]], tokens: int) -> dict[str, dict[str, float]]:
    """Median, tenth and ninetieth percentile of tokens per second, by contender.

    Args:
        times: seconds per step.
        tokens: of a step.
    """
    found = {}
    for name, values in times.items():
        rates = sorted(tokens / seconds for seconds in values)
        found[name] = {
            "tokens_per_second": statistics.median(rates),
            "low": rates[len(rates) // 10],
            "high": rates[-1 - len(rates) // 10],
        }
    return found
