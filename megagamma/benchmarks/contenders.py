"""Contenders of a benchmark: each in a process of its own, and all in turns.

A process of its own gives each the allocator and the OpenMP settings that it has in use; taking turns gives all the same
share of a noisy machine.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from megagamma.errors import MegagammaError

Step = Callable[[], None]
Make = Callable[..., tuple[Step, dict[str, Any]]]
"""(step, facts) of a contender, made in its process."""
_WARM_UP = 3  # steps; the first compiles
_TURN = 0.5  # seconds


def _work(connection: Connection, sleeping_threads: bool, make: Make, arguments: Sequence[Any]) -> None:
    from megagamma.environment import choose_threads, let_waiting_threads_sleep

    if sleeping_threads:
        let_waiting_threads_sleep()  # before torch is imported
    import torch

    torch.set_num_threads(choose_threads(0, 1))
    begin = time.perf_counter()
    step, facts = make(*arguments)
    for _ in range(_WARM_UP):
        step()
    connection.send({**facts, "start_seconds": time.perf_counter() - begin})
    while (count := connection.recv()) is not None:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        connection.send(seconds)


class Contender:
    """A process that makes steps when it is told to."""

    def __init__(self, name: str, make: Make, *arguments: Any, sleeping_threads: bool = False) -> None:
        """Start it, and wait for its first steps.

        Args:
            name: for messages.
            make: see `Make`; a module's function.
            arguments: of `make`.
            sleeping_threads: set up OpenMP as a run of ours does.

        Raises:
            MegagammaError: it ended by itself; what it said is on the console.
        """
        self.name = name
        self._end, theirs = multiprocessing.Pipe()
        start = multiprocessing.get_context("spawn")
        self._process = start.Process(target=_work, args=(theirs, sleeping_threads, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._receive()
        """Of `make`, and the seconds until the warm-up was over."""

    def _receive(self) -> Any:
        try:
            return self._end.recv()
        except EOFError:
            self._process.join()
            raise MegagammaError(
                f"benchmark: {self.name} ended with exit code {self._process.exitcode}; what it said is above"
            ) from None

    def run(self, steps: int) -> list[float]:
        """Seconds of each of some steps."""
        self._end.send(steps)
        seconds: list[float] = self._receive()
        return seconds

    def close(self) -> None:
        """End the process."""
        self._end.send(None)
        self._process.join()


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
