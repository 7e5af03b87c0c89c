"""Leaving when a signal asks for it, or when the run's folder has another owner."""

from __future__ import annotations

from megagamma.errors import MegagammaError
from megagamma.training.callbacks.base import Callback, Step
from megagamma.training.signals import StopSignals


class StopOnSignal(Callback):
    """Lets the run leave after the step in which any rank got one of `StopSignals`; `Checkpointing` saves before."""

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
    """Ends a run whose folder is no longer its own: another process has taken it, as after this one was suspended for
    minutes, or somebody has deleted or renamed it. Comes before what writes."""

    def begin(self) -> None:
        """Remember which folder it is."""
        self._check()

    def after_step(self, step: Step) -> None:
        """Look before anything is written of a step."""
        self._check()

    def end(self) -> None:
        """Look once more: a run that says it is done must have its files."""
        self._check()

    def _check(self) -> None:
        """Ask rank 0, which writes the files.

        Raises:
            MegagammaError: on every rank.
        """
        problem = self._problem()
        self.session.runtime.raise_on_all_ranks(MegagammaError(problem) if problem else None, "in the run's folder")

    def _problem(self) -> str:
        if self.session.lock.lost:
            return (
                f"run.folder={self.session.folder.path}: {self.session.lock.lost}; this process writes nothing more: end one "
                "of the two, and start the other again"
            )
        lost = self.session.reporter.lost()
        return lost and f"{lost}; this process writes nothing more: put it back, and start the run again"
