"""Which rank is slow: the forward passes of ranks that do the same work, compared.

A step takes equally long on all ranks, since they wait for each other; what tells them apart is the time before they
have to. Forward passes are such a time between data-parallel ranks (tensor-parallel ranks wait for each other inside
them, and are slow together).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megagamma.distributed.runtime import Runtime


class ForwardClock:
    """Sums the time of forward passes: on a GPU by events in its stream, without waiting for them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Around one forward pass."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def read(self) -> float:
        """Seconds since the last reading."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass(frozen=True)
class Straggler:
    """The slowest rank, against the median of those on its pipeline stage."""

    rank: int
    host: str
    ratio: float


def find_straggler(runtime: Runtime, seconds: float) -> Straggler | None:
    """Compare the time of forward passes; a collective. None when no two ranks do the same work."""
    if runtime.data_size == 1:
        return None
    found = runtime.gather((runtime.pipeline_rank, runtime.host, seconds))
    worst: Straggler | None = None
    for rank, (stage, host, mine) in enumerate(found):
        usual = statistics.median_low(other for peer, _, other in found if peer == stage)
        ratio = mine / usual if usual > 0 else 1.0
        if worst is None or ratio > worst.ratio:
            worst = Straggler(rank, host, ratio)
    return worst
