"""Global batch size and length of a run, as pure functions of the config and the samples consumed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megagamma.config.schema import Config, DataConfig


def batch_size(data: DataConfig, consumed: int) -> int:
    """Global batch size after `consumed` samples. Unit: samples.

    With a ramp [start, increment, samples], the batch grows by `increment` each time another equal share of `samples`
    is consumed, as Megatron's rampup-batch-size does.
    """
    if data.batch_ramp is None:
        return data.global_batch_size
    start, increment, samples = data.batch_ramp
    rises = (data.global_batch_size - start) // increment
    if rises == 0 or consumed >= samples:
        return data.global_batch_size
    return start + increment * min(rises, consumed * (rises + 1) // samples)


def _ramp(data: DataConfig) -> Iterator[tuple[int, int]]:
    """Batch sizes of the ramp below the last, and how many steps have each: a run of any length is counted at once."""
    if data.batch_ramp is None:
        return
    start, increment, samples = data.batch_ramp
    rises, consumed = (data.global_batch_size - start) // increment, 0
    while (size := batch_size(data, consumed)) < data.global_batch_size:
        following = -(-((size - start) // increment + 1) * samples // (rises + 1))  # samples at which the batch grows
        steps = -(-(following - consumed) // size)
        yield size, steps
        consumed += steps * size


def total_steps(config: Config) -> int:
    """Optimizer steps of the run, from run.steps or from the token budget, rounded up to whole steps."""
    if config.run.steps is not None:
        return config.run.steps
    assert config.run.tokens is not None
    missing, done = math.ceil(config.run.tokens / config.data.sequence_length), 0
    for size, steps in _ramp(config.data):
        steps = min(steps, math.ceil(missing / size))
        missing, done = missing - steps * size, done + steps
        if missing <= 0:
            return done
    return done + math.ceil(missing / config.data.global_batch_size)


def samples_before(data: DataConfig, step: int) -> int:
    """Samples consumed by steps 1 to `step`. Unit: samples."""
    consumed, left = 0, step
    for size, steps in _ramp(data):
        steps = min(steps, left)
        consumed, left = consumed + steps * size, left - steps
        if not left:
            return consumed
    return consumed + left * data.global_batch_size
