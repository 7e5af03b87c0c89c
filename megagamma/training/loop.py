"""The training loop. It knows when; callbacks know what."""

from __future__ import annotations

import time
from typing import Any, NoReturn

from megagamma.cli import EXIT_STOPPED
from megagamma.data.contracts import Batch, rank_microbatches
from megagamma.data.schedule import batch_size
from megagamma.distributed.replay import replay
from megagamma.errors import MegagammaError, TrainingError
from megagamma.reporting.log import duration
from megagamma.training.callbacks.base import Callback, Step
from megagamma.training.schedule import learning_rate
from megagamma.training.setup import Session


class Trainer:
    """Runs a session to its last step."""

    def __init__(self, session: Session, callbacks: list[Callback]) -> None:
        """Args: callbacks: called in this order, see `Callback`."""
        self.session, self.callbacks = session, callbacks
        self.stop_reason: str | None = None
        """Set by a callback, on every rank alike, to leave after the step at hand."""
        for callback in callbacks:
            callback.attach(self)
            if callback.state_key in session.progress:
                callback.load_state(session.progress[callback.state_key])

    def run(self) -> int:
        """Train to the last step; returns the exit code: 0, or `EXIT_STOPPED` after a signal.

        Raises:
            TrainingError: a guard's policy says stop.
        """
        session, reporter = self.session, self.session.reporter
        try:
            if session.step >= session.steps:
                reporter.print(f"{session.folder.path}: all {session.steps} steps are done already")
                self._check_result()
                # Also where the run was killed between its last checkpoint and its end, which others wait for.
                reporter.event("end", step=session.step, seconds=session.seconds)
                return 0
            reporter.print(session.describe())
            for callback in self.callbacks:
                callback.begin()
            while session.step < session.steps:
                self._train_step()
                if self.stop_reason is not None:
                    for callback in self.callbacks:
                        callback.on_stop(self.stop_reason)
                    return EXIT_STOPPED
            for callback in self.callbacks:
                callback.end()
            self._check_result()
            reporter.event("end", step=session.step, seconds=session.seconds)
            reporter.print(f"done: {session.steps} steps in {duration(session.seconds)}; see {session.folder.path}")
            return 0
        finally:
            for callback in reversed(self.callbacks):
                callback.close()

    def _forward_backward(self, number: int, batches: list[Batch]) -> float:
        """The step's passes, twice where `guard.replay_interval` says so."""
        engine, interval = self.session.engine, self.session.config.guard.replay_interval
        if not interval or number % interval:
            return engine.forward_backward(batches)
        loss, problem = replay(engine, batches)
        if problem is not None:
            engine.discard()
            self.session.reporter.event("replay", step=number, problem=problem)
            self.halt(
                TrainingError(
                    f"step {number}: {problem}: a device or its memory is faulty; test that host, take it out, and "
                    "resume"
                )
            )
        return loss

    def _check_result(self) -> None:
        for callback in self.callbacks:
            callback.check_result()

    def _train_step(self) -> None:
        session, config, engine = self.session, self.session.config, self.session.engine
        began = time.perf_counter()
        number, size = session.step + 1, batch_size(config.data, session.consumed)
        lr = learning_rate(config.schedule, config.optimizer.lr, number, session.steps)
        batches = rank_microbatches(
            session.data.train,
            session.consumed,
            size,
            config.data.micro_batch_size,
            session.runtime.data_rank,
            session.runtime.data_size,
        )
        engine.set_learning_rate(lr)
        loss = self._forward_backward(number, batches)
        step = Step(number, range(session.consumed, session.consumed + size), lr, number == session.steps, loss)
        # All are asked, also after a no.
        may_update = [callback.before_update(step) for callback in self.callbacks]
        if all(may_update):
            step.tried = True
            step.applied = engine.step()
        else:
            engine.discard()
        for callback in self.callbacks:
            callback.after_update(step)
        step.seconds = time.perf_counter() - began
        session.step, session.consumed = number, session.consumed + size
        session.seconds += step.seconds
        for callback in self.callbacks:
            callback.after_step(step)

    def halt(self, error: MegagammaError) -> NoReturn:
        """End the run with an error that every rank raises; callbacks first finish what they have begun.

        Raises:
            MegagammaError: the error.
        """
        for callback in self.callbacks:
            callback.on_halt()
        raise error

    def callback_states(self) -> dict[str, Any]:
        """What the callbacks want to find again after a resume, by their keys."""
        return {c.state_key: c.state() for c in self.callbacks if c.state_key is not None}
