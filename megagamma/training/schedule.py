"""Learning rate and global batch size as pure functions of the step."""

from __future__ import annotations

import math

from megagamma.config import Config, DataConfig, ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Length of the warm-up. Unit: steps."""
    if schedule.warmup_steps is not None:
        return min(schedule.warmup_steps, steps)
    return math.ceil(schedule.warmup_ratio * steps)


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of a step.

    Args:
        schedule: shape and ratios.
        peak: `optimizer.lr`.
        step: from 1 to `steps`.
        steps: length of the run.

    Returns:
        During a warm-up of w steps, peak * step / w. Then, with x the share of the remaining steps that are done:
        cosine: m + (peak - m) (1 + cos(pi x)) / 2; linear: peak - (peak - m) x; wsd: peak, then linear to m over the
        last decay_ratio of the run; constant: peak. m is peak * min_lr_ratio.
    """
    warm = warmup_steps(schedule, steps)
    if step <= warm:
        return peak * step / warm
    floor = peak * schedule.min_lr_ratio
    x = min(1.0, (step - warm) / max(1, steps - warm))
    if schedule.shape == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * x))
    if schedule.shape == "linear":
        return peak - (peak - floor) * x
    if schedule.shape == "wsd":
        decay = max(1, math.ceil(schedule.decay_ratio * steps))
        y = (step - (steps - decay)) / decay
        return peak if y <= 0 else peak - (peak - floor) * min(1.0, y)
    return peak


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
