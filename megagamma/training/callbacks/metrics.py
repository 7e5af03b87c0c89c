"""Numbers of a step: speed, utilization, memory, the slowest rank; recorded and printed."""

from __future__ import annotations

import functools
import math
import time

import torch

from megagamma.config.schema import LoggingConfig
from megagamma.distributed.straggler import find_straggler
from megagamma.planning.flops import flops_per_token, known_peak_flops, measure_matmul_peak
from megagamma.training.callbacks.base import Callback, Step


class Straggler(Callback):
    """Names the rank whose forward passes take longest, on steps that are printed."""

    def __init__(self, logging: LoggingConfig) -> None:
        self.logging = logging

    def after_step(self, step: Step) -> None:
        """Add slowest_rank, slowest_host and slowest_ratio."""
        if not is_printed(step, self.logging):
            return
        slow = find_straggler(self.session.runtime, self.engine.forward_clock.read())
        if slow is not None:
            step.values |= {"slowest_rank": slow.rank, "slowest_host": slow.host, "slowest_ratio": slow.ratio}


@functools.cache
def _cpu_peak(dtype: torch.dtype, threads: int) -> float:
    """`measure_matmul_peak`, once in a process."""
    return measure_matmul_peak(dtype, threads)


def is_printed(step: Step, logging: LoggingConfig) -> bool:
    """Whether a step has a line on the console."""
    return step.number == 1 or step.is_last or step.number % logging.console_interval == 0


class Metrics(Callback):
    """Records a step in metrics.jsonl and wandb at `logging.interval`, and prints it at `logging.console_interval`."""

    def __init__(self, logging: LoggingConfig) -> None:
        self.logging = logging

    def begin(self) -> None:
        """Measure the peak that utilization refers to, and start the clock of the estimated end."""
        config = self.config
        self.flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self.peak = self._peak_flops()
        self._began, self._first_step = time.perf_counter(), self.session.step

    def _peak_flops(self) -> float | None:
        """Peak rate of all ranks' devices together, in the precision in use. Unit: FLOP/s.

        Of a GPU the data sheet's 16-bit peak; of a CPU, the rate of a matrix product measured now.
        """
        runtime = self.session.runtime
        if runtime.device.type == "cuda":
            one = known_peak_flops(torch.cuda.get_device_name(runtime.device))
            return None if one is None else one * runtime.size
        return _cpu_peak(self.engine.dtype, runtime.threads) * runtime.size

    def after_step(self, step: Step) -> None:
        """Add speed, utilization, memory and the time left; record and print."""
        session, length = self.session, self.config.data.sequence_length
        tokens = len(step.samples) * length
        achieved = self.flops_per_token * tokens / step.seconds
        values = {
            "step": step.number,
            "loss": step.loss,
            "grad_norm": self.engine.grad_norm,
            "lr": step.lr,
            "tokens": session.consumed * length,
            "samples": session.consumed,
            "first_sample": step.samples.start,
            "seconds": session.seconds,
            "step_seconds": step.seconds,
            "tokens_per_second": tokens / step.seconds,
            "tflops": achieved / 1e12,
            "mfu": achieved / self.peak if self.peak else math.nan,
            "memory_gib": session.runtime.memory_bytes() / 2**30,
            "eta_seconds": self._seconds_left(),
            **step.values,
        }
        record = step.is_last or step.number % self.logging.interval == 0
        session.reporter.step(values, session.steps, is_printed(step, self.logging), record)

    def _seconds_left(self) -> float:
        """At the pace since this process began, validation and saving included."""
        done = max(1, self.session.step - self._first_step)
        return (time.perf_counter() - self._began) / done * (self.session.steps - self.session.step)
