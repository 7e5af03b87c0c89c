"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megagamma.config.schema import ScheduleConfig


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
