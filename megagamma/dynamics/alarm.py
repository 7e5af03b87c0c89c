"""An early alarm for spikes: updates that grow before the loss does."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megagamma.config.schema import DynamicsConfig
from megagamma.dynamics.measure import by_role, measure
from megagamma.dynamics.sources import of_engine
from megagamma.training.callbacks.base import Callback, Step

WINDOW = 64
"""Looks that one is compared with."""
_FEWEST = 16
"""Looks before which nothing is reported."""
_LEAST_DEVIATION = 0.03
"""Of the mean: updates that hardly vary are not reported for a change of a few percent."""


class UpdateAlarm(Callback):
    """Watches the rms of AdamW's update over the learning rate, which neither schedule nor drawn std moves.

    In a public run the norm of the updates doubled before the loss spiked (marin#1368 [REF]). Here one is reported that lies
    `dynamics.alarm_sigma` standard deviations above the mean of the last `WINDOW` looks; which role moves most beside what was
    drawn is reported with it, since a number beside the weights' own std would be wrong by construction at gamma 1.
    """

    state_key = "recent_updates"

    def __init__(self, options: DynamicsConfig) -> None:
        self.interval, self.sigma = options.alarm_interval, options.alarm_sigma
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def state(self) -> Any:
        """The sizes that the next ones are compared with."""
        return list(self.recent)

    def load_state(self, state: Any) -> None:
        """Take them up; what is no list of numbers is left out, since the alarm changes nothing."""
        if isinstance(state, list) and all(isinstance(value, int | float) for value in state):
            self.recent.extend(state)

    def is_far(self, size: float) -> bool:
        """Whether a size is far above the recent ones."""
        if len(self.recent) < _FEWEST:
            return False
        mean = statistics.fmean(self.recent)
        return size > mean + self.sigma * max(statistics.stdev(self.recent), _LEAST_DEVIATION * mean)

    def after_update(self, step: Step) -> None:
        """Look, when it is due and the update was made."""
        if not self.interval or step.number % self.interval or not step.applied:
            return
        size = self.engine.state.direction_rms()
        step.values["update_over_lr"] = size
        if not math.isfinite(size):
            return
        if self.is_far(size):
            self._report(step, size)
        self.recent.append(size)

    def _report(self, step: Step, size: float) -> None:
        own = measure(of_engine(self.engine, step.number), ("motion",))
        everyone: dict[str, dict[str, Any]] = {}
        for one in self.session.runtime.gather(own):
            everyone |= one
        roles = {
            role: values["update_over_drawn_std"]
            for role, values in by_role(everyone).items()
            if "update_over_drawn_std" in values
        }
        mean, reporter, samples = statistics.fmean(self.recent), self.session.reporter, step.samples
        reporter.event(
            "update_alarm", step=step.number, samples=[samples.start, samples.stop], update_over_lr=size, recent_mean=mean,
            update_over_drawn_std=roles,
        )  # fmt: skip
        worst = max(roles, key=roles.__getitem__, default="")
        most = f"; {worst} moves most, {roles[worst]:.3g} of its drawn std" if worst else ""
        reporter.warn(
            f"updates grow at step {step.number}, samples {samples.start} to {samples.stop - 1}: {size:.3g} of the learning "
            f"rate, {size / mean:.1f} x the recent mean{most}. A loss spike may follow: a lower optimizer.lr or "
            "optimizer.clip_grad avoids it"
        )
