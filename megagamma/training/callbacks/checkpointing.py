"""When checkpoints are written, and which are kept."""

from __future__ import annotations

import time
from pathlib import Path

from megagamma.checkpoint.saver import Saver, prune
from megagamma.config.io import as_dict
from megagamma.config.schema import CheckpointConfig
from megagamma.training.callbacks.base import Callback, Step


class Checkpointing(Callback):
    """Saves at `checkpoint.interval`, at permanent steps, at the end, and when the run is asked to stop."""

    def __init__(self, rules: CheckpointConfig) -> None:
        self.rules = rules
        self._began, self._stall = 0.0, 0.0
        self._kept: set[int] = set()

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

    def after_step(self, step: Step) -> None:
        """Save when it is due; complete an asynchronous save that has written everything."""
        rules, stopping = self.rules, self.trainer.stop_reason is not None
        if self.saver.pending:
            self._report(self.saver.poll())
        due = bool(rules.interval) and step.number % rules.interval == 0
        if due or stopping or self.is_permanent(step.number) or (step.is_last and rules.at_end):
            # A process that is about to leave must not leave a thread behind.
            self._save(asynchronous=rules.asynchronous and not stopping and not step.is_last)

    def on_halt(self) -> None:
        """Complete a save that is under way."""
        self._report(self.saver.finish())

    def end(self) -> None:
        """Complete a save that is under way."""
        self._report(self.saver.finish())

    def _save(self, asynchronous: bool = False) -> None:
        session = self.session
        begin = time.perf_counter()
        self._report(self.saver.finish())
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

    def _report(self, folder: Path | None) -> None:
        """Note a finished checkpoint, and delete the ones that are too old."""
        if folder is None:
            return
        reporter = self.session.reporter
        if self.session.runtime.is_main:
            run = self.session.folder
            permanent = {step for step in run.steps() if self.is_permanent(step)}
            prune(run.checkpoints, self.rules.keep_last, permanent, self._warn_once)
        seconds = time.perf_counter() - self._began
        reporter.event("checkpoint", folder=folder.name, seconds=seconds, stall_seconds=self._stall)
        reporter.print(f"  saved {folder} in {seconds:.1f}s (training waited {self._stall:.1f}s)")

    def _warn_once(self, step: int, text: str) -> None:
        if step not in self._kept:
            self._kept.add(step)
            self.session.reporter.warn(text)
