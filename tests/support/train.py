"""Small real trainings that run inside a rank of a pool."""

from __future__ import annotations

from typing import Any

SMOKE = ("--config", "configs/smoke.yaml")


def build_engine(arguments: list[str]) -> tuple[Any, Any]:
    """(config, engine) of a smoke-sized model on this rank; the world is the pool's."""
    import torch

    from megagamma.config.io import parse_config
    from megagamma.data.sources import open_data
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.training.assembly import fresh_engine

    world = world_from_environment()
    config = parse_config([*SMOKE, *arguments], world_size=world.size)
    runtime = Runtime(config, world)
    data = open_data(config)
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    engine = fresh_engine(config, runtime, dtype)
    engine.data = data  # type: ignore[attr-defined]
    return config, engine


def batches(config: Any, engine: Any, step: int) -> list[dict[str, Any]]:
    """This rank's microbatches of a step (from 1)."""
    from megagamma.data.batches import microbatch_ids

    size, micro = config.data.global_batch_size, config.data.micro_batch_size
    ranks, rank = engine.runtime.data_size, engine.runtime.data_rank
    return [
        engine.data.train.batch(microbatch_ids((step - 1) * size, index, micro, rank, ranks))
        for index in range(size // (micro * ranks))
    ]


def train_steps(arguments: list[str], steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first steps at a constant rate."""
    config, engine = build_engine(arguments)
    found = []
    for step in range(1, steps + 1):
        engine.set_learning_rate(config.optimizer.lr)
        loss = engine.forward_backward(batches(config, engine, step))
        assert engine.step()
        found.append((loss, engine.grad_norm))
    engine.close()
    return found


def run_trainer(arguments: list[str]) -> int:
    """A whole run, as `megagamma/pretrain.py` makes it; returns its exit code."""
    from megagamma.config.io import parse_config
    from megagamma.environment import world_from_environment
    from megagamma.training.loop import Trainer
    from megagamma.training.setup import prepare_session

    config = parse_config([*SMOKE, *arguments], world_size=world_from_environment().size)
    session = prepare_session(config)
    code = Trainer(session).run()
    session.engine.close()
    return code
