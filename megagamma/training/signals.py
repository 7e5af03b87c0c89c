"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType


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
