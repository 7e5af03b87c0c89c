"""The main job put together: the one place that knows training and what is plugged into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megagamma.config.schema import Config
from megagamma.data.sources import RunData
from megagamma.distributed.runtime import Runtime
from megagamma.dynamics.alarm import UpdateAlarm
from megagamma.dynamics.callback import Dynamics
from megagamma.environment import World
from megagamma.evaluation.callback import BenchmarkScoring, check_harness
from megagamma.inputs import open_data
from megagamma.training.callbacks.base import Callback
from megagamma.training.callbacks.standard import standard_callbacks
from megagamma.training.loop import Trainer
from megagamma.training.setup import Session, prepare_session


def prepare(config: Config, world: World | None = None, open_data: Callable[[Config], RunData] = open_data) -> Session:
    """Everything before the first step, see `prepare_session`.

    Args:
        config: resolved, and validated for the world's size.
        world: who this process is; read from the environment when not given.
        open_data: opens the run's data; another one brings data that are not prepared text.
    """
    runtime = Runtime(config, world)
    runtime.run_on_rank0(lambda: check_harness(config))
    return prepare_session(config, runtime, open_data)


def train(
    config: Config,
    world: World | None = None,
    open_data: Callable[[Config], RunData] = open_data,
    measuring: Sequence[Callback] = (),
) -> int:
    """Train a run to its last step.

    Args:
        config, world, open_data: see `prepare`.
        measuring: further callbacks that add to a step's values, before it is recorded.

    Raises:
        MegagammaError: one clear reason.

    Returns:
        The exit code, see `Trainer.run`.
    """
    session = prepare(config, world, open_data)
    with session:
        callbacks = standard_callbacks(
            config,
            [BenchmarkScoring(config.validation), Dynamics(config.dynamics), UpdateAlarm(config.dynamics), *measuring],
        )
        return Trainer(session, callbacks).run()
