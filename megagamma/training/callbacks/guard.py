"""Losses and gradients that make no sense: reported, left out, or the end of the run."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from megagamma.config.schema import GuardConfig
from megagamma.errors import TrainingError
from megagamma.training.callbacks.base import Callback, Step

_PHRASES = {"nan": "loss or gradient that is not finite", "spike": "loss spike"}


class LossGuard(Callback):
    """Notices a loss or gradient that is not finite, and a loss far above its recent mean."""

    state_key = "recent_losses"

    def __init__(self, guard: GuardConfig) -> None:
        self.guard = guard
        self.recent: deque[float] = deque(maxlen=guard.spike_window)
        self.skips = 0
        """Updates in a row that were left out."""
        self._status = "ok"

    def state(self) -> list[float]:
        """The losses that the next ones are compared with."""
        return list(self.recent)

    def load_state(self, state: Any) -> None:
        """Take them up."""
        self.recent.extend(state)

    def check(self, loss: float) -> str:
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

    def policy(self, status: str) -> str:
        """What the config wants done about a step that is not ok: "report", "stop" or "skip"."""
        action = self.guard.on_nan if status == "nan" else self.guard.on_spike
        if action == "skip":
            self.skips += 1
            if self.skips > self.guard.max_skips:
                return "stop"
        return action

    def before_update(self, step: Step) -> bool:
        """Leave the update out, or end the run, when the loss makes no sense."""
        self._status = self.check(step.loss)
        if self._status == "ok":
            return True
        action = self.policy(self._status)
        self._report(step, action)
        return action == "report"

    def after_update(self, step: Step) -> None:
        """Notice an update that the optimizer refused, since its gradients are not finite."""
        if step.applied:
            self.skips = 0
        elif step.tried:
            self._report(step, self.policy("nan"), "nan")

    def _report(self, step: Step, action: str, status: str | None = None) -> None:
        status = status or self._status
        samples, reporter = step.samples, self.session.reporter
        where = f"step {step.number}, samples {samples.start} to {samples.stop - 1}"
        norm = self.engine.grad_norm
        text = f"{_PHRASES[status]} at {where}: loss {step.loss:.4f}, gradient norm {norm:.4g}, policy {action}"
        reporter.event(status, step=step.number, loss=step.loss, samples=[samples.start, samples.stop], policy=action)
        if action != "stop":
            reporter.warn(text)
            return
        self.engine.discard()
        self.trainer.halt(
            TrainingError(
                f"{text}: the weights are those of step {step.number - 1}; see the batch with tools/prepare_data.py "
                f"--inspect, lower optimizer.lr, or use --guard.on_{status} skip"
            )
        )
