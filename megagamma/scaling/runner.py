"""Runs a sweep's points on this machine, several at a time.

Each point is one or more processes forked from a server that has made a run's imports, so that a point of seconds does not
pay for them, and one that crashes takes nothing with it. The server and the points end with the runner: a later call
resumes what was stopped, and skips what is finished.
"""

from __future__ import annotations

import collections
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from megagamma.cli import EXIT_STOPPED
from megagamma.environment import cores_of_this_process, visible_gpus
from megagamma.errors import ConfigurationError
from megagamma.forked import launch
from megagamma.launching.attempts import blames_a_peer, errors_in
from megagamma.reporting.log import duration
from megagamma.runs.folder import RunFolder
from megagamma.scaling.folder import KINDS, PointState, SweepFolder, is_running, note_end, note_start, read_state
from megagamma.scaling.grid import StopLost
from megagamma.scaling.tuning import is_lost, last_loss

_POLL_SECONDS = 0.2
_LOCK_SECONDS = 150.0  # a lock is void after 120
_TAIL = 1 << 16  # bytes of a point's log that an error is looked for in


@dataclass
class _Running:
    state: PointState
    processes: list[BaseProcess]
    gpus: list[str]
    began: float
    log_size: int
    """Bytes of its log that earlier attempts wrote."""
    is_behind: bool = False


@dataclass(frozen=True)
class Resources:
    """What points share on this machine."""

    at_once: int
    threads: int
    """Of one point."""
    gpus: tuple[str, ...]


def divide(at_once: int | None, processes: int, on_gpus: bool) -> Resources:
    """Share cores and GPUs between points.

    Args:
        at_once: points at a time; None: as many as there are GPUs for, or one per core and four at most.
        processes: of the largest point.
        on_gpus: whether points use GPUs.

    Raises:
        ConfigurationError: `at_once` is below 1, or needs more GPUs than there are.
    """
    cores, gpus = cores_of_this_process(), visible_gpus() if on_gpus else []
    if at_once is None:
        at_once = max(1, len(gpus) // processes) if gpus else max(1, min(4, cores // processes))
    if at_once < 1:
        raise ConfigurationError(f"--at_once {at_once} must be at least 1")
    if gpus and at_once * processes > len(gpus):
        raise ConfigurationError(
            f"--at_once {at_once}: points of {processes} processes need {at_once * processes} GPUs, and there are "
            f"{len(gpus)}: use {max(1, len(gpus) // processes)} or less"
        )
    return Resources(at_once, max(1, cores // (at_once * processes)), tuple(gpus))


class Runner:
    """Runs the points of a sweep that are not finished."""

    def __init__(
        self,
        folder: SweepFolder,
        states: list[PointState],
        resources: Resources,
        retries: int,
        stop_lost: StopLost | None = None,
        say: Callable[[str], None] = print,
        look_seconds: float = 2.0,
    ) -> None:
        """
        Args:
            folder: of the sweep, locked and claimed.
            states: all points; those that are final are left alone.
            retries: of a point that fails.
            stop_lost: when points of a tuned axis are ended early.
            say: prints a line.
            look_seconds: between two looks at what running points have reached.
        """
        self.folder, self.states, self.resources, self.retries = folder, states, resources, retries
        self.stop_lost, self.say, self.look_seconds = stop_lost, say, look_seconds
        todo = [state for state in states if not state.is_final and state.status != "queued"]
        # The longest first: the others fill the gaps at the end.
        self.todo = collections.deque(sorted(todo, key=lambda state: -state.point.flops))
        self.running: list[_Running] = []
        self.waited: dict[str, float] = {}
        """When a point was first found in use by another process, by its name."""
        self.left = [state.point.name for state in states if state.status == "queued"]
        """Points that other processes run, or that are in SLURM's queue."""
        self.free_gpus = list(resources.gpus)
        self.signal: str | None = None
        self._began, self._looked, self._look_took = time.monotonic(), 0.0, 0.0
        self._flops_before = sum(_flops_done(state) for state in states)

    def run(self) -> int:
        """Run until no point is left; returns 0, 1 when points were given up, or 75 after a signal or for points of others."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.todo or self.running:
                self._start_some()
                if self.signal is not None and not self.running:
                    break
                sentinels = [process.sentinel for one in self.running for process in one.processes]
                if sentinels:
                    connection.wait(sentinels, timeout=_POLL_SECONDS)
                elif self.todo:
                    time.sleep(_POLL_SECONDS)
                for one in list(self.running):
                    if all(process.exitcode is not None for process in one.processes):
                        self._finish(one)
                self._look()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for one in self.running:
                for process in one.processes:
                    process.kill()
        if self.signal is not None:
            self.say(f"stopped by {self.signal}; points are saved: the same command resumes")
            return EXIT_STOPPED
        if any(state.status == "given up" for state in self.states):
            return 1
        if self.left:
            self.say(
                f"{len(self.left)} points are left to others ({self.left[0]}, ...): give the command again when they end"
            )
            return EXIT_STOPPED
        return 0

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Ask the points to save and leave; at a second signal, end them."""
        hurry = self.signal is not None
        self.signal = signal.Signals(number).name
        for one in self.running:
            self._end(one, hurry)

    @staticmethod
    def _end(one: _Running, hurry: bool = False) -> None:
        for process in one.processes:
            process.kill() if hurry else process.terminate()

    # -- one point -----------------------------------------------------------------------------------------------

    def _start_some(self) -> None:
        """Start points while there is room; those in use by a process that may be ending are looked at again later."""
        for _ in range(len(self.todo)):
            if len(self.running) >= self.resources.at_once or self.signal is not None:
                return
            state = self.todo.popleft()
            if is_running(state.folder):
                self._wait_for(state)
            else:
                self._start(state)

    def _wait_for(self, state: PointState) -> None:
        name, now = state.point.name, time.monotonic()
        if name not in self.waited:
            self.waited[name] = now
            self.say(f"{name}: in use by another run: waiting for it to end")
        if now - self.waited[name] < _LOCK_SECONDS:
            self.todo.append(state)
            return
        self.say(f"{name}: is run by another process: left to it")
        state.status = "running"
        self.left.append(name)

    def _start(self, state: PointState) -> None:
        point = state.point
        # What another run of it did in the meantime counts.
        fresh = read_state(point, state.hash, state.folder, self.retries)
        vars(state).update(vars(fresh))
        if state.is_final:
            return
        size = point.launch.processes
        gpus = [self.free_gpus.pop(0) for _ in range(size)] if self.resources.gpus else []
        note_start(state)
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
            # Its default is one for each of the machine's cores, which points share.
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(self.resources.threads)
        arguments = [f"--config={(state.folder / 'point.yaml').absolute()}", "--checkpoint.on_damage=previous"]
        if not point.config.run.threads:
            arguments.append(f"--run.threads={self.resources.threads}")
        log = (self.folder.logs / f"{point.name}.log").absolute()
        log_size = log.stat().st_size if log.exists() else 0
        processes = launch(size, arguments, log, Path.cwd(), environment=environment)
        state.status = "running"
        self.running.append(_Running(state, processes, gpus, time.monotonic(), log_size))
        if self.signal is not None:
            # It came while they were started, and has not reached them.
            self._end(self.running[-1])
        resumed = f", from step {state.step}" if state.step and RunFolder(state.folder).steps() else ""
        self.say(f"{point.name}: started{resumed}{f', attempt {state.attempts}' if state.attempts > 1 else ''}")

    def _finish(self, one: _Running) -> None:
        self.running.remove(one)
        self.free_gpus = sorted([*self.free_gpus, *one.gpus])
        state, seconds = one.state, time.monotonic() - one.began
        code = code_of_point([process.exitcode or 0 for process in one.processes])
        kind, problem = KINDS.get(code, "failed"), ""
        if code in (75, -signal.SIGTERM) and (one.is_behind or self.signal is not None):
            kind = "behind" if one.is_behind else "stopped"  # also where it had not begun to listen
        elif kind == "done" and read_state(state.point, state.hash, state.folder, self.retries).status != "done":
            kind, problem = "failed", "ended with exit code 0 before its last step"
        elif kind not in ("done", "stopped"):
            errors = errors_in(self.folder.logs / f"{state.point.name}.log", _TAIL, one.log_size)
            if kind == "refused" and blames_a_peer(errors):
                kind = "failed"
            problem = errors[-1].removeprefix("error:").strip()[:400] if errors and code > 0 else _ending(code)
        note_end(state, kind, code, seconds, problem)
        fresh = read_state(state.point, state.hash, state.folder, self.retries)
        vars(state).update(vars(fresh))
        self.say(f"{state.point.name}: {self._describe(state, kind, seconds)}; {self._progress()}")
        if not state.is_final and self.signal is None:
            self.todo.append(state)

    def _describe(self, state: PointState, kind: str, seconds: float) -> str:
        where = f"at step {state.step} of {state.point.steps}"
        if kind == "done":
            loss = last_loss(state.metrics)
            result = f"validation loss {loss:.4f}, " if loss is not None else ""
            return f"done, {result}{duration(seconds)} ({max(0.0, seconds - state.training_seconds):.1f} s outside of steps)"
        if kind == "diverged":
            return f"diverged {where}, which is its result: {state.problem}"
        if kind == "behind":
            return f"ended {where}: its loss is behind the best of its group"
        if kind == "stopped":
            return f"stopped {where}"
        again = (
            "given up" if state.status == "given up" else f"will be tried again ({state.failures} of {self.retries})"
        )
        return f"failed {where}, {again}: {state.problem}"

    # -- all points ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Now and then: the progress, and which running points are behind."""
        now = time.monotonic()
        # Files of long runs take a while to read: a twentieth of the time at most.
        if now - self._looked < max(self.look_seconds, 20 * self._look_took):
            return
        self._looked = now
        for one in self.running:
            one.state.metrics = RunFolder(one.state.folder).metrics().read()
            one.state.step = int(one.state.metrics[-1]["step"]) if one.state.metrics else 0
        self._look_took = time.monotonic() - now
        if self.stop_lost is not None:
            for one in self.running:
                if not one.is_behind and is_lost(one.state, self.states, self.stop_lost):
                    one.is_behind = True
                    self._end(one)
        if sys.stdout.isatty():
            print(f"\r{self._progress()[: os.get_terminal_size().columns - 1]:<60}", end="", flush=True)

    def _progress(self) -> str:
        """How much of the sweep is done, and how long the rest takes at this pace."""
        final = sum(state.is_final for state in self.states)
        total = sum(state.point.flops for state in self.states)
        done = sum(_flops_done(state) for state in self.states)
        seconds = time.monotonic() - self._began
        rate = (done - self._flops_before) / seconds if seconds > 0 else 0.0
        eta = duration((total - done) / rate) if rate > 0 else "?"
        return f"{final} of {len(self.states)} points, {done / total:.0%} of the FLOPs, eta {eta}"

    def overhead(self) -> str:
        """What the points spent outside of their steps, as a line; empty when none was run."""
        spent = [s.seconds - s.training_seconds for s in self.states if s.status == "done" and s.seconds > 0]
        if not spent:
            return ""
        return (
            f"outside of training steps (start, data, validation, saving): median {statistics.median(spent):.1f} s a point, "
            f"{sum(spent):.0f} s in all"
        )


def code_of_point(codes: list[int]) -> int:
    """Exit code of a point from those of its ranks; negative for a signal.

    A rank that was killed or crashed leaves the others with codes of their own, 2 for the most part, since they lost it: its
    own is the cause.
    """
    killed = [code for code in codes if code < 0]
    others = sorted((code for code in codes if code not in (0, 75)), key=lambda code: code == 2)
    return killed[0] if killed else 3 if 3 in codes else others[0] if others else max(codes)


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _flops_done(state: PointState) -> float:
    if state.is_final:
        return state.point.flops
    return state.point.flops * min(1.0, state.step / state.point.steps)
