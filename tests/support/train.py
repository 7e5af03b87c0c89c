"""Small real trainings that run inside a rank of a pool."""

from __future__ import annotations

from typing import Any

SMOKE = ("--config", "configs/smoke.yaml")


def build_engine(arguments: list[str]) -> tuple[Any, Any]:
    """(config, engine) of a smoke-sized model on this rank; the world is the pool's."""
    from megagamma.config.io import parse_config
    from megagamma.data.sources import open_data
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.training.assembly import fresh_engine

    world = world_from_environment()
    config = parse_config([*SMOKE, *arguments], world_size=world.size)
    runtime = Runtime(config, world)
    data = open_data(config)
    config.model.vocab_size = config.model.vocab_size or data.vocab_size
    engine = fresh_engine(config, runtime)
    engine.data = data  # type: ignore[attr-defined]
    return config, engine


def batches(config: Any, engine: Any, step: int) -> list[Any]:
    """This rank's microbatches of a step (from 1)."""
    from megagamma.data.contracts import rank_microbatches

    size, micro = config.data.global_batch_size, config.data.micro_batch_size
    runtime = engine.runtime
    first = (step - 1) * size
    return rank_microbatches(engine.data.train, first, size, micro, runtime.data_rank, runtime.data_size)


def train_steps(arguments: list[str], steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first steps at a constant rate."""
    config, engine = build_engine(arguments)
    pairs = []
    for step in range(1, steps + 1):
        engine.set_learning_rate(config.optimizer.lr)
        loss = engine.forward_backward(batches(config, engine, step))
        assert engine.step()
        pairs.append((loss, engine.grad_norm))
    engine.close()
    return pairs


def run_trainer(arguments: list[str]) -> int:
    """A whole run, as `megagamma/pretrain.py` makes it; returns its exit code."""
    from megagamma.config.io import parse_config
    from megagamma.environment import world_from_environment
    from megagamma.job import train

    world = world_from_environment()
    return train(parse_config([*SMOKE, *arguments], world_size=world.size), world)
