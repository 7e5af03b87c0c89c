"""Whether the copies of replicated weights are still equal."""

from __future__ import annotations

from megagamma.config.schema import GuardConfig
from megagamma.distributed.replicas import check_replicas
from megagamma.training.callbacks.base import Callback, Step


class ReplicaCheck(Callback):
    """Compares them over ranks every `guard.replica_interval` steps, and ends a run that drifted."""

    def __init__(self, guard: GuardConfig) -> None:
        self.interval = guard.replica_interval

    def after_step(self, step: Step) -> None:
        """Compare when it is due."""
        if self.interval and step.number % self.interval == 0:
            check_replicas(self.engine)
