"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignals:
    """Remembers SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGXCPU; the loop asks between steps.

    A second signal that is SIGTERM or SIGINT leaves at once, without a checkpoint. The others come more than once by
    themselves: from schedulers, from a terminal that closes, and each second beyond a limit of CPU time. Nor does a SIGTERM
    that follows SIGUSR1 hurry: schedulers announce by the one what they enforce by the other, and SLURM sends both at the
    same time. A SIGHUP that was ignored at the start, as under nohup, stays ignored.
    """

    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
    hurried = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        self._is_urgent = False
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._before = {
            number: signal.signal(number, self._receive) for number in self.watched if number not in ignored
        }

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._is_urgent and number in self.hurried:
            os._exit(128 + number)
        self._is_urgent = self._is_urgent or number != signal.SIGUSR1
        self.received = signal.Signals(number).name

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
