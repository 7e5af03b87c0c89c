"""The training loop: step, guard, validate, report, save, stop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from megagamma.checkpoint import saver as checkpoint
from megagamma.checkpoint.reader import steps_saved
from megagamma.config.io import as_dict
from megagamma.data.batches import microbatch_ids
from megagamma.data.schedule import batch_size
from megagamma.distributed.replicas import check_replicas
from megagamma.distributed.straggler import find_straggler
from megagamma.errors import TrainingError
from megagamma.evaluation.callback import score_live
from megagamma.planning.flops import flops_per_token, known_peak_flops, measure_matmul_peak
from megagamma.reporting.log import duration, validation_line
from megagamma.training.guard import LossGuard, StopSignals
from megagamma.training.sampling import continue_text
from megagamma.training.schedule import learning_rate
from megagamma.training.setup import Session

# Exit code of a run that a signal stopped after it saved: start it again to go on (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75


class Trainer:
    """Runs a session to its last step."""

    def __init__(self, session: Session) -> None:
        self.session, self.config = session, session.config
        self.engine, self.runtime, self.reporter = session.engine, session.runtime, session.reporter
        self.guard = LossGuard(self.config.guard)
        self.guard.recent.extend(session.progress.get("recent_losses", []))
        self.saver = checkpoint.Saver(self.engine, session.checkpoints)
        self._saving, self._stall = 0.0, 0.0
        self.signals = StopSignals()
        self.began = time.perf_counter()
        self.flops_per_token = flops_per_token(self.config.model, self.config.data.sequence_length)
        self.peak = self._peak_flops()

    def _peak_flops(self) -> float | None:
        """Peak rate of all ranks' devices together; on a CPU, the matrix product's rate measured now. Unit: FLOP/s."""
        if self.runtime.device.type == "cuda":
            one = known_peak_flops(torch.cuda.get_device_name(self.runtime.device))
            return None if one is None else one * self.runtime.size
        return measure_matmul_peak(torch.float32) * self.runtime.size

    def run(self) -> int:
        """Train to the last step; returns the exit code: 0, or `EXIT_STOPPED` after a signal.

        Raises:
            TrainingError: the guard's policy says stop.
        """
        session = self.session
        try:
            if session.step >= session.steps:
                self.reporter.say(f"{session.folder}: all {session.steps} steps are done already")
                return 0
            self._begin()
            while session.step < session.steps:
                stopped = self._one_step()
                if stopped:
                    return EXIT_STOPPED
            self._finish()
            return 0
        finally:
            self.signals.restore()
            self.reporter.close()

    def _begin(self) -> None:
        session, config = self.session, self.config
        if session.step == 0 and config.checkpoint.save_initial:
            self._save()
        batch = config.data.global_batch_size
        self.reporter.say(
            f"training {session.folder} from step {session.step} to {session.steps}: {batch} samples of "
            f"{config.data.sequence_length} tokens a step, on {self.runtime.size} x {self.runtime.device.type} "
            f"(tensor {self.runtime.tensor_size}, pipeline {config.parallel.pipeline}, data {self.runtime.data_size}, "
            f"ZeRO {self.engine.stage})"
        )

    # -- a step --------------------------------------------------------------------------------------------------

    def _batches(self, size: int) -> tuple[list[dict[str, torch.Tensor]], range]:
        session, micro = self.session, self.config.data.micro_batch_size
        first, ranks = session.consumed, self.runtime.data_size
        batches = [
            session.data.train.batch(microbatch_ids(first, index, micro, self.runtime.data_rank, ranks))
            for index in range(size // (micro * ranks))
        ]
        return batches, range(first, first + size)

    def _one_step(self) -> bool:
        """Make one step; returns whether a signal asks to leave (the state is saved then)."""
        session, config = self.session, self.config
        begin = time.perf_counter()
        step = session.step + 1
        size = batch_size(config.data, session.consumed)
        rate = learning_rate(config.schedule, config.optimizer.lr, step, session.steps)
        batches, samples = self._batches(size)
        self.engine.set_learning_rate(rate)
        loss = self.engine.forward_backward(batches)
        self._update(step, loss, samples)
        session.step, session.consumed = step, session.consumed + size
        took = time.perf_counter() - begin
        session.seconds += took
        values = self._values(loss, rate, size, took)
        last = step == session.steps
        due = config.validation.interval and step % config.validation.interval == 0
        if due or (last and config.validation.at_end):
            values |= self._validate(config.validation.windows)
            if last and config.validation.full_at_end:
                values |= self._validate(0, "_full")
        values |= self._score(last)
        if config.guard.replica_interval and step % config.guard.replica_interval == 0:
            check_replicas(self.engine)
        every = config.logging
        console = step == 1 or last or step % every.console_interval == 0
        if console:
            slow = find_straggler(self.runtime, self.engine.forward_clock.read())
            if slow is not None:
                values |= {"slowest_rank": slow.rank, "slowest_host": slow.host, "slowest_ratio": slow.ratio}
        self.reporter.step(values, session.steps, console, record=last or step % every.interval == 0)
        if every.sample_interval and step % every.sample_interval == 0 and not last:
            self._sample()
        # After the last step there is nothing left to stop.
        stopping = self.runtime.any_rank(self.signals.received is not None) and not last
        self._save_when_due(last, stopping)
        return stopping

    def _update(self, step: int, loss: float, samples: range) -> None:
        """Step the optimizer, or do what the guard says about a loss or gradient that makes no sense."""
        verdict = self.guard.judge(loss)
        action = self.guard.policy(verdict)
        if action in ("stop", "skip"):
            self.engine.discard()
        elif not self.engine.step():
            verdict = "nan"
            action = self.guard.policy(verdict)
        if verdict == "ok":
            return
        what = {"nan": "loss or gradient that is not finite", "spike": "loss spike"}[verdict]
        where = f"step {step}, samples {samples.start} to {samples.stop - 1}"
        text = f"{what} at {where}: loss {loss:.4f}, gradient norm {self.engine.grad_norm:.4g}, policy {action}"
        ids = [samples.start, samples.stop]
        self.reporter.event(verdict, step=step, loss=loss, samples=ids, policy=action)
        if action == "stop":
            self._report_saved(self.saver.finish())
            raise TrainingError(
                f"{text}: the weights are those of step {step - 1}; see the batch with tools/prepare_data.py --inspect, "
                f"lower optimizer.lr, or use --guard.on_{verdict} skip"
            )
        self.reporter.warn(text)

    def _values(self, loss: float, rate: float, size: int, took: float) -> dict[str, Any]:
        session, length = self.session, self.config.data.sequence_length
        achieved = self.flops_per_token * size * length / took
        return {
            "step": session.step,
            "loss": loss,
            "grad_norm": self.engine.grad_norm,
            "lr": rate,
            "tokens": session.consumed * length,
            "samples": session.consumed,
            "seconds": session.seconds,
            "step_seconds": took,
            "tokens_per_second": size * length / took,
            "tflops": achieved / 1e12,
            "mfu": achieved / self.peak if self.peak else math.nan,
            "memory_gib": self.runtime.memory_bytes() / 2**30,
            "eta_seconds": self._eta(),
        }

    def _eta(self) -> float:
        """Seconds to the end at the pace since this process began, validation and saving included."""
        started = self.session.progress.setdefault("started_at_step", self.session.step - 1)
        done = max(1, self.session.step - started)
        return (time.perf_counter() - self.began) / done * (self.session.steps - self.session.step)

    # -- between steps -------------------------------------------------------------------------------------------

    def _validate(self, limit: int, suffix: str = "") -> dict[str, float]:
        """Loss on the first `limit` windows (0: all) of every set, in nats per token and bits per byte of text.

        A pass over another part of a set has another name, by `suffix`: their losses do not compare.
        """
        values: dict[str, float] = {}
        micro, ranks = self.config.data.micro_batch_size, self.runtime.data_size
        stages = self.config.parallel.pipeline  # microbatches at a time, to fill the pipeline
        for held_name, held_out in self.session.data.validation.items():
            name = held_name + suffix
            windows = min(limit, held_out.windows) if limit else held_out.windows
            total, tokens = 0.0, 0.0
            for first in range(0, windows, micro * ranks * stages):
                batches = []
                for number in range(stages):
                    ids = microbatch_ids(first, number, micro, self.runtime.data_rank, ranks)
                    # Numbers past the last window stand for empty ones, so that every rank runs the same passes.
                    batches.append(held_out.batch([index if index < windows else held_out.windows for index in ids]))
                one, count = self.engine.evaluate(batches)
                total, tokens = total + one, tokens + count
            loss = total / max(tokens, 1.0)
            bits = total / (math.log(2) * held_out.predicted_bytes(windows))
            values[f"val/{name}/loss"], values[f"val/{name}/bits_per_byte"] = loss, bits
            self.reporter.say(validation_line(self.session.step, name, loss, bits, int(tokens)))
        return values

    def _score(self, last: bool) -> dict[str, float]:
        """Benchmark scores, when they are due."""
        asked, session = self.config.validation, self.session
        due = last or (asked.harness_interval and session.step % asked.harness_interval == 0)
        if not asked.harness_tasks or not due:
            return {}
        return score_live(self.engine, session.data.tokenizer, self.config, session.step, self.reporter)

    def _sample(self) -> None:
        logging = self.config.logging
        if logging.sample_tokens:
            text = continue_text(self.engine, self.session.data.tokenizer, logging.sample_prompt, logging.sample_tokens)
            self.reporter.sample(self.session.step, logging.sample_prompt, text)

    def _is_permanent(self, step: int) -> bool:
        rules = self.config.checkpoint
        power_of_two = step > 0 and step & (step - 1) == 0
        return step in rules.permanent or (rules.log_spaced and power_of_two) or (step == 0 and rules.save_initial)

    def _save_when_due(self, last: bool, stopping: bool) -> None:
        rules, step = self.config.checkpoint, self.session.step
        due = bool(rules.interval) and step % rules.interval == 0
        if self.saver.pending:
            self._report_saved(self.saver.poll())
        if due or stopping or self._is_permanent(step) or (last and rules.at_end):
            # A process that is about to leave must not leave a thread behind.
            self._save(asynchronous=rules.asynchronous and not stopping and not last)
            if stopping:
                self.reporter.event("stopped", step=step, signal=self.signals.received)
                self.reporter.say(
                    f"stopped by {self.signals.received or 'a signal to another rank'} at step {step}; saved: the same "
                    "command goes on"
                )

    def _save(self, asynchronous: bool = False) -> None:
        session = self.session
        begin = time.perf_counter()
        self._report_saved(self.saver.finish())
        state = {
            "config": as_dict(self.config),
            "consumed_samples": session.consumed,
            "seconds": session.seconds,
            "tokenizer": session.data.tokenizer.fingerprint,
            "progress": {"recent_losses": list(self.guard.recent)},
        }
        self._saving = begin
        finished = self.saver.save(session.step, state, asynchronous)
        self._stall = time.perf_counter() - begin
        self._report_saved(finished)

    def _report_saved(self, path: Path | None) -> None:
        """Note a finished checkpoint, and delete the ones that are too old."""
        if path is None:
            return
        if self.runtime.is_main:
            root, rules = self.session.checkpoints, self.config.checkpoint
            keep = {step for step in steps_saved(root) if self._is_permanent(step)}
            checkpoint.prune(root, rules.keep_last, keep)
        took = time.perf_counter() - self._saving
        self.reporter.event("checkpoint", folder=path.name, seconds=took, stall_seconds=self._stall)
        self.reporter.say(f"  saved {path} in {took:.1f}s (training waited {self._stall:.1f}s)")

    def _finish(self) -> None:
        self._report_saved(self.saver.finish())
        self._sample()
        session = self.session
        self.reporter.event("end", step=session.step, seconds=session.seconds)
        self.reporter.say(f"done: {session.steps} steps in {duration(session.seconds)}; see {session.folder}")
