"""Global batch size and length of a run, as pure functions of the config and the samples consumed."""

from __future__ import annotations

import math

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


def total_steps(config: Config) -> int:
    """Optimizer steps of the run, from run.steps or from the token budget, rounded up to whole steps."""
    if config.run.steps is not None:
        return config.run.steps
    assert config.run.tokens is not None
    wanted = math.ceil(config.run.tokens / config.data.sequence_length)
    consumed, steps = 0, 0
    while (
        consumed < wanted
        and config.data.batch_ramp is not None
        and batch_size(config.data, consumed) < config.data.global_batch_size
    ):
        consumed += batch_size(config.data, consumed)
        steps += 1
    return steps + max(0, math.ceil((wanted - consumed) / config.data.global_batch_size))


def samples_before(data: DataConfig, step: int) -> int:
    """Samples consumed by steps 1 to `step`. Unit: samples."""
    if data.batch_ramp is None:
        return step * data.global_batch_size
    consumed, done = 0, 0
    while done < step and batch_size(data, consumed) < data.global_batch_size:
        consumed += batch_size(data, consumed)
        done += 1
    return consumed + (step - done) * data.global_batch_size
