"""When checkpoints are written, and which are kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from megagamma.checkpoint.retention import prune
from megagamma.checkpoint.saver import Saver
from megagamma.config.io import as_dict
from megagamma.config.schema import CheckpointConfig
from megagamma.errors import CheckpointError
from megagamma.training.callbacks.base import Callback, Step


class Checkpointing(Callback):
    """Saves at `checkpoint.interval`, at permanent steps, at the end, and when the run is asked to stop.

    A save that fails while training continues is a warning and an event; at the second in a row the run ends. One that
    training waits for ends it at once.
    """

    def __init__(self, rules: CheckpointConfig) -> None:
        self.rules = rules
        self._began, self._stall = 0.0, 0.0
        self._kept: set[int] = set()
        """Steps whose checkpoints stay beyond keep_last, and were warned about."""
        self._failures = 0
        """Asynchronous saves in a row that failed."""
        self._problem = ""
        """Of the last one."""

    def begin(self) -> None:
        """Write the untrained model where that is asked for."""
        self.saver = Saver(self.engine, self.session.folder.checkpoints)
        if self.session.step == 0 and self.rules.save_initial:
            self._save()

    def is_permanent(self, step: int) -> bool:
        """Whether the checkpoint of a step is written and never deleted."""
        power_of_two = step > 0 and step & (step - 1) == 0
        return (
            step in self.rules.permanent
            or (self.rules.log_spaced and power_of_two)
            or (step == 0 and self.rules.save_initial)
        )

    def before_update(self, step: Step) -> bool:
        """Let a save that is under way copy what the update will change."""
        self.saver.wait_for_copy()
        return True

    def after_step(self, step: Step) -> None:
        """Save when it is due; complete an asynchronous save that has written everything."""
        rules, stopping = self.rules, self.trainer.stop_reason is not None
        self._complete(self.saver.poll)
        due = bool(rules.interval) and step.number % rules.interval == 0
        if due or stopping or self.is_permanent(step.number) or (step.is_last and rules.at_end):
            # A process that is about to leave must not leave a thread behind.
            self._save(asynchronous=rules.asynchronous and not stopping and not step.is_last)

    def on_halt(self) -> None:
        """Complete a save that is under way. Another error ends the run: this one must not take its place."""
        try:
            self._report(self.saver.finish())
        except CheckpointError as error:
            self._note_failure(error)

    def end(self) -> None:
        """Complete a save that is under way.

        Raises:
            CheckpointError: the last save of the run failed: no later one will make up for it.
        """
        self._complete(self.saver.finish)
        if self._failures:
            self.trainer.halt(CheckpointError(f"the last save of the run failed: {self._problem}"))

    def _save(self, asynchronous: bool = False) -> None:
        session = self.session
        begin = time.perf_counter()
        self._complete(self.saver.finish)
        state = {
            "config": as_dict(self.config),
            "consumed_samples": session.consumed,
            "seconds": session.seconds,
            "tokenizer": session.data.fingerprint,
            "progress": self.trainer.callback_states(),
        }
        self._began = begin
        folder = self.saver.save(session.step, state, asynchronous)
        self._stall = time.perf_counter() - begin
        self._report(folder)

    def _complete(self, action: Callable[[], Path | None]) -> None:
        """Complete an asynchronous save by `poll` or `finish`.

        Raises:
            CheckpointError: it failed, and so did the one before.
        """
        try:
            self._report(action())
        except CheckpointError as error:
            self._note_failure(error)
            if self._failures > 1:
                again = CheckpointError(f"{self._failures} saves in a row failed, the last one: {error}")
                self.trainer.halt(again)

    def _note_failure(self, error: CheckpointError) -> None:
        self._failures, self._problem = self._failures + 1, str(error)
        reporter, step = self.session.reporter, self.session.step
        reporter.event("checkpoint_failed", step=step, failures=self._failures, problem=str(error))
        reporter.warn(f"{error}; training continues, and a second failure in a row ends the run")

    def _report(self, folder: Path | None) -> None:
        """Note a finished checkpoint, and delete the ones that are too old."""
        if folder is None:
            return
        self._failures = 0
        reporter = self.session.reporter
        if self.session.runtime.is_main:
            run, now = self.session.folder, self.session.step
            # Later ones are corrupt, and this run resumed from one before them: they must not push out what it writes.
            permanent = {step for step in run.steps() if self.is_permanent(step) or step > now}
            prune(run.checkpoints, self.rules.keep_last, permanent, self._warn_once)
        seconds = time.perf_counter() - self._began
        reporter.event("checkpoint", folder=folder.name, seconds=seconds, stall_seconds=self._stall)
        reporter.print(f"  saved {folder} in {seconds:.1f}s (training waited {self._stall:.1f}s)")

    def _warn_once(self, step: int, text: str) -> None:
        if step not in self._kept:
            self._kept.add(step)
            self.session.reporter.warn(text)
