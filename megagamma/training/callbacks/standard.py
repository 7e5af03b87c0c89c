"""The callbacks of every run, in their order."""

from __future__ import annotations

from collections.abc import Sequence

from megagamma.config.schema import Config
from megagamma.training.callbacks.base import Callback
from megagamma.training.callbacks.checkpointing import Checkpointing
from megagamma.training.callbacks.guard import LossGuard
from megagamma.training.callbacks.metrics import Metrics, Straggler
from megagamma.training.callbacks.replicas import ReplicaCheck
from megagamma.training.callbacks.samples import Samples
from megagamma.training.callbacks.stopping import FolderLock, StopOnSignal
from megagamma.training.callbacks.validation import Validation


def standard_callbacks(config: Config, measuring: Sequence[Callback] = ()) -> list[Callback]:
    """First the owner of the folder and the guard; then what measures a step; then what records it; at last what saves.

    Args:
        measuring: further callbacks that add to a step's values, before it is recorded.
    """
    return [
        FolderLock(),
        LossGuard(config.guard),
        Validation(config.validation),
        *measuring,
        ReplicaCheck(config.guard),
        Straggler(config.logging),
        Metrics(config.logging),
        Samples(config.logging),
        StopOnSignal(),
        Checkpointing(config.checkpoint),
    ]
