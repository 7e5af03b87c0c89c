"""The seam between the loop and what is done around its steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megagamma.config.schema import Config
from megagamma.distributed.engine import Engine

if TYPE_CHECKING:
    from megagamma.training.loop import Trainer
    from megagamma.training.setup import Session


@dataclass
class Step:
    """A step as callbacks see it."""

    number: int
    """From 1 to the last step of the run."""
    samples: range
    """Numbers of the samples of its global batch."""
    lr: float
    is_last: bool
    loss: float
    """Mean over the global batch, before the update. Unit: nats per token."""
    tried: bool = False
    """Whether the optimizer was asked for its update: no callback left it out."""
    applied: bool = False
    """Whether the optimizer made its update."""
    seconds: float = 0.0
    """Of forward, backward and update."""
    values: dict[str, Any] = field(default_factory=dict)
    """What is recorded of the step in metrics.jsonl; callbacks before `Metrics` add to it."""


class Callback:
    """Does one thing around the steps of a run; every rank calls it alike.

    The loop calls the callbacks of its list in their order:

        begin                     once, before the first step of this process
        before_update(step)       between the backward pass and the optimizer's update; False leaves the update out
        after_update(step)        at once after it; see `step.applied`
        after_step(step)          when the step is counted; slow work belongs here
        on_stop(reason)           a signal asked to leave, after the last `after_step`
        on_halt()                 an error that all ranks raise ends the run: finish what was begun
        end                       after the last step of the run
        check_result()            then, and where all steps were done before: whether the run may end as a success
        close                     always, also after an error of this rank alone; no collective belongs here

    Raise an error that every rank meets by `self.trainer.halt(error)`.
    """

    state_key: str | None = None
    """Key of `state` in a checkpoint's `progress`; None: it has none."""
    trainer: Trainer

    def attach(self, trainer: Trainer) -> None:
        """Called once, before `begin`."""
        self.trainer = trainer

    @property
    def session(self) -> Session:
        """The run: its config, data, reporter, folder, and where it stands."""
        return self.trainer.session

    @property
    def engine(self) -> Engine:
        """What runs batches through the model."""
        return self.trainer.session.engine

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.trainer.session.config

    def state(self) -> Any:
        """What a resume needs, as JSON takes it; written into every checkpoint."""
        return None

    def load_state(self, state: Any) -> None:
        """Take up what `state` gave; called before `begin` when the checkpoint has it."""

    def begin(self) -> None:
        """Before the first step."""

    def before_update(self, step: Step) -> bool:
        """Between backward and update: whether the update may be made."""
        return True

    def after_update(self, step: Step) -> None:
        """After the update, or after it was left out."""

    def after_step(self, step: Step) -> None:
        """When the step is counted."""

    def on_stop(self, reason: str) -> None:
        """The run leaves because of a signal."""

    def on_halt(self) -> None:
        """The run ends with an error that all ranks raise."""

    def end(self) -> None:
        """After the last step."""

    def check_result(self) -> None:
        """When all steps are done and nothing is under way; raises, on every rank, where the run is no success."""

    def close(self) -> None:
        """When this process is done with the run, in whatever way."""
