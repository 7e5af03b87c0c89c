"""Losses that make no sense, and signals that ask the run to stop."""

from __future__ import annotations

import math
import os
import signal
from collections import deque
from types import FrameType

from megagamma.config.schema import GuardConfig


class LossGuard:
    """Tells a loss that is not finite, or far above its recent mean."""

    def __init__(self, guard: GuardConfig) -> None:
        self.guard = guard
        self.recent: deque[float] = deque(maxlen=guard.spike_window)
        self.skips = 0

    def judge(self, loss: float) -> str:
        """Returns "ok", "nan" or "spike"; an ok loss joins the window that later ones are compared with."""
        if not math.isfinite(loss):
            return "nan"
        if len(self.recent) == self.recent.maxlen:
            mean = sum(self.recent) / len(self.recent)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in self.recent) / (len(self.recent) - 1))
            if loss > mean + self.guard.spike_sigma * max(deviation, 1e-3 * abs(mean)):
                return "spike"
        self.recent.append(loss)
        return "ok"

    def policy(self, verdict: str) -> str:
        """What the config wants done: "go on", "report", "stop" or "skip"."""
        if verdict == "ok":
            self.skips = 0
            return "go on"
        action = self.guard.on_nan if verdict == "nan" else self.guard.on_spike
        if action == "skip":
            self.skips += 1
            if self.skips > self.guard.max_skips:
                return "stop"
        return action


class StopSignals:
    """Remembers SIGTERM, SIGINT and SIGUSR1; the loop asks between steps.

    A second signal of a kind other than SIGUSR1 leaves at once, without a checkpoint.
    """

    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before = {number: signal.signal(number, self._receive) for number in self.watched}

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number != signal.SIGUSR1:
            os._exit(128 + number)
        self.received = signal.Signals(number).name

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
