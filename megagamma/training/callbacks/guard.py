"""Losses and gradients that make no sense: reported, left out, or the end of the run."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from megagamma.config.schema import GuardConfig
from megagamma.errors import CheckpointError, TrainingError
from megagamma.training.callbacks.base import Callback, Step

# A run whose last steps, as many as these or all that it has, are left out does not end as a success.
LAST_STEPS = 3

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

    def state(self) -> dict[str, Any]:
        """The losses that the next ones are compared with, and how many updates in a row were left out."""
        return {"losses": list(self.recent), "skips": self.skips}

    def load_state(self, state: Any) -> None:
        """Take them up; checkpoints of version 0.1 hold the losses alone.

        Raises:
            CheckpointError: it is neither.
        """
        values = state if isinstance(state, dict) else {"losses": state, "skips": 0}
        losses, skips = values.get("losses"), values.get("skips")
        if (
            not isinstance(losses, list)
            or not all(type(loss) in (int, float) for loss in losses)
            or type(skips) is not int
        ):
            raise CheckpointError(
                f"the checkpoint's progress.{self.state_key} is not what was written: delete it to resume from the one before"
            )
        self.recent.extend(losses)
        self.skips = skips

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

    def check_result(self) -> None:
        """End with an error when the last steps changed nothing: nobody wants such a model for the finished one.

        Raises:
            TrainingError: the last `LAST_STEPS` steps, or all of a shorter run, were left out.
        """
        steps = self.session.steps
        if self.skips < min(LAST_STEPS, steps):
            return
        self.session.reporter.event("no_update_at_end", step=self.session.step, skips=self.skips)
        raise TrainingError(
            f"the last {self.skips} of {steps} steps made no update, since their losses or gradients were left out: the "
            f"weights are those of step {steps - self.skips}; see events.jsonl for the reasons, lower optimizer.lr, or go "
            "back to an earlier checkpoint"
        )

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
