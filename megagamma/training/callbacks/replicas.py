"""Whether the copies of replicated weights, moments and gradients are still equal."""

from __future__ import annotations

import math

from megagamma.config.schema import GuardConfig
from megagamma.distributed.replicas import check_gradients, check_replicas
from megagamma.errors import TrainingError
from megagamma.training.callbacks.base import Callback, Step


class ReplicaCheck(Callback):
    """Compares them over ranks every `guard.replica_interval` steps, and ends a run that drifted."""

    def __init__(self, guard: GuardConfig) -> None:
        self.interval = guard.replica_interval

    def _is_due(self, step: Step) -> bool:
        return bool(self.interval) and step.number % self.interval == 0

    def before_update(self, step: Step) -> bool:
        """Compare the gradients when it is due; what is not finite is the guard's matter."""
        if self._is_due(step) and math.isfinite(step.loss):
            try:
                check_gradients(self.engine)
            except TrainingError as error:
                self.engine.discard()
                self.trainer.halt(error)
        return True

    def after_step(self, step: Step) -> None:
        """Compare weights and moments when it is due."""
        if self._is_due(step):
            try:
                check_replicas(self.engine)
            except TrainingError as error:
                self.trainer.halt(error)
