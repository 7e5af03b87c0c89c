"""Leaving when a signal asks for it, or when the run's folder has another owner."""

from __future__ import annotations

from megagamma.errors import MegagammaError
from megagamma.training.callbacks.base import Callback, Step
from megagamma.training.signals import StopSignals


class StopOnSignal(Callback):
    """Lets the run leave after the step in which any rank got SIGTERM, SIGINT or SIGUSR1; `Checkpointing` saves before."""

    def attach(self, trainer):  # type: ignore[no-untyped-def]
        """Listen from here on."""
        super().attach(trainer)
        self.signals = StopSignals()

    def after_step(self, step: Step) -> None:
        """Ask all ranks. After the last step there is nothing left to stop."""
        if self.session.runtime.any_rank(self.signals.received is not None) and not step.is_last:
            self.trainer.stop_reason = self.signals.received or "a signal to another rank"

    def on_stop(self, reason: str) -> None:
        """Say how to resume."""
        reporter, step = self.session.reporter, self.session.step
        reporter.event("stopped", step=step, signal=self.signals.received)
        reporter.print(f"stopped by {reason} at step {step}; saved: the same command resumes")

    def close(self) -> None:
        """Give the signals back."""
        self.signals.restore()


class FolderLock(Callback):
    """Ends a run whose folder another process has taken, as after this one was suspended for minutes: two must not write."""

    def after_step(self, step: Step) -> None:
        """Look at what the lock's thread has seen."""
        if self.session.lock.lost:
            error = MegagammaError(
                f"run.folder={self.session.folder.path}: {self.session.lock.lost}; this process writes nothing more: end one "
                "of the two, and start the other again"
            )
            error.on_one_rank = True
            raise error
