"""Looks after a run's processes: starts them, forwards signals, notices a hang, and decides whether to start them again.

| what ends an attempt | what follows |
|---|---|
| exit code 0 | done |
| 2: config, data or machine; 3: stopped by the guard | the same exit code; not started again |
| SIGUSR1 to the supervisor: preemption, or the time limit ahead | saved; under SLURM the job is requeued, else started again |
| SIGTERM, SIGINT, SIGHUP | saved; exit code 75 |
| a crash, a kill, a failed launch, a lost rank or node, a hang | started again, until failures are too many (93) |

It imports no torch, starts at once, and holds no GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megagamma.cli import EXIT_STOPPED
from megagamma.environment import SlurmJob
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import advice
from megagamma.launching import slurm
from megagamma.launching.attempts import Attempt, AttemptLog, Kind, failures, fingerprint, kind_of
from megagamma.launching.stacks import RankStack, read_stacks, silent_ranks
from megagamma.runs.folder import RunFolder

# Exit code of a chain of attempts that came no further.
EXIT_NO_PROGRESS = 93

# Failures in a row without a newer checkpoint after which another attempt would only burn time.
ROW = 2

_POLL = 0.1
_REPEAT = 5.0  # between two tries to reach ranks that may have been starting
_STACKS = 10.0  # for the ranks to answer
_KILL = 30.0  # for a launcher to end after its ranks were killed
_STAY = 3600.0  # for SLURM to end a job that it has taken back
_SETTLE = 3.0  # for SLURM to notice what a rank notices at once


@dataclass(frozen=True)
class Rules:
    """When a run is started again."""

    max_failures: int = 5
    """Failures of a chain, after which it ends. Preemptions are no failures."""
    hang_minutes: float = 15.0
    """Without a step, an event or a byte of a checkpoint, after which ranks count as hung; 0: never. Unit: minutes."""


class _Tail:
    """Repeats what is added to a log on this process's standard output."""

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, 0

    def pump(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            with open(self.path, "rb") as file:
                file.seek(self._place)
                text = file.read(1 << 20)
            self._place += len(text)
            if text:
                sys.stdout.write(text.decode("utf-8", errors="replace"))
                sys.stdout.flush()


class StopRequests:
    """The signals that ask a supervisor to stop, in the order in which they came. Made before anything slow."""

    watched = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: list[int] = []
        # A SIGHUP that is ignored, as under nohup, stays ignored. SIGUSR1 the batch scripts ignore while they hand over.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._before = {
            number: signal.signal(number, self._receive) for number in self.watched if number not in ignored
        }

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Supervisor:
    """Runs a command until the run is done, or must not be started again."""

    def __init__(
        self,
        folder: RunFolder,
        command: Sequence[str],
        rules: Rules,
        requests: StopRequests,
        job: SlurmJob | None = None,
    ) -> None:
        """
        Args:
            folder: of the run.
            command: what to start, such as srun and its options, python, megagamma/pretrain.py and its options. `{logs}` in
                a word stands for the folder of the attempt's logs.
            requests: signals, also those that came before.
            job: the SLURM job that this process is the batch script of; None outside.
        """
        self.folder, self.command, self.rules, self.job = folder, list(command), rules, job
        self.requests = requests
        self.log = AttemptLog(folder)
        self.chain = f"job {job.id}" if job else f"process {os.getpid()} since {time.time():.0f}"
        self.is_srun = Path(self.command[0]).name == "srun"
        self.stop: Kind | None = None
        """"preempted" or "stopped" once a signal has asked for it."""

    # -- the chain -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run to the end; returns the exit code, see `megagamma.cli`."""
        mark = fingerprint(self.command)
        if self.log.has_ended(mark):
            self._say(f"{self.folder.path} is trained to its end already: nothing to do")
            return 0
        while True:
            refusal = self._refusal()
            if refusal:
                self._say(refusal)
                return EXIT_NO_PROGRESS
            self._take_signals(None)
            if self.stop is not None:
                return self._leave()
            attempt = self._attempt(mark)
            if attempt.kind in ("done", "refused", "diverged"):
                return {"done": 0, "refused": 2, "diverged": 3}[attempt.kind]
            if attempt.kind in ("preempted", "stopped"):
                if attempt.kind == "preempted" and self.job is None:
                    self.stop = None
                    continue
                return self._leave()
            if self.job is not None and not self._may_restart(self.job):
                return EXIT_STOPPED

    def _refusal(self) -> str:
        """Why there is no further attempt; empty when there is one."""
        own = [attempt for attempt in self.log.read() if attempt.chain == self.chain]
        total, in_a_row = failures(own)
        step = self.log.newest_step()
        where = "no checkpoint" if step is None else f"the checkpoint of step {step}"
        if in_a_row >= ROW:
            return (
                f"{in_a_row} failures in a row left no checkpoint newer than {where}: not started again; see "
                f"{self.folder.attempt_logs(own[-1].number)}, fix the cause, and give the same command"
            )
        if total >= self.rules.max_failures:
            return (
                f"{total} failures, --max_failures={self.rules.max_failures}: not started again; see "
                f"{self.folder.attempts_file}, and give the same command to continue from {where}"
            )
        return ""

    def _leave(self) -> int:
        """After a signal: hand the job back to SLURM where that is right, and stay until it ends this process.

        A batch script that leaves by itself is over, not requeued, also when SLURM wanted to preempt it.
        """
        if self.job is None:
            return EXIT_STOPPED
        if self.stop == "preempted":
            try:
                slurm.requeue(self.job.id)
            except slurm.SlurmError as error:
                self._say(f"{error}: submit the job again to resume")
                return EXIT_STOPPED
            self._say(f"job {self.job.id} is requeued")
        elif self._belongs_to_this_process(self.job):
            return EXIT_STOPPED
        self._stay()
        return EXIT_STOPPED

    @staticmethod
    def _belongs_to_this_process(job: SlurmJob) -> bool:
        """Whether SLURM means the job to run on: it is neither being ended nor preempted."""
        fields = slurm.job_fields(job.id)
        return fields.get("JobState") == "RUNNING" and fields.get("PreemptTime", "None") == "None"

    def _stay(self) -> None:
        end = time.monotonic() + _STAY
        while time.monotonic() < end:
            time.sleep(_POLL)

    def _may_restart(self, job: SlurmJob) -> bool:
        """Whether the job and its nodes are fit for another attempt. Where a node is gone SLURM is left to requeue the job.

        A rank notices a lost node at once, SLURM minutes later: attempts until then would all fail.
        """
        time.sleep(_SETTLE)
        self._take_signals(None)
        if self.stop is not None:
            return True  # the loop leaves
        if self._belongs_to_this_process(job):
            if not self.is_srun or slurm.nodes_answer(job.node_count, 60):
                return True
            self._say(f"a node of {job.nodes} does not answer: waiting for SLURM to requeue the job")
        for _ in range(int(600 / _POLL)):
            time.sleep(_POLL)
            self._take_signals(None)
            if self.stop is not None:
                return True
        self.stop = "preempted"
        return True

    # -- one attempt ---------------------------------------------------------------------------------------------

    def _attempt(self, mark: str) -> Attempt:
        known = self.log.read()
        number = max((attempt.number for attempt in known), default=0) + 1
        logs = self.folder.attempt_logs(number)
        try:
            logs.mkdir(parents=True, exist_ok=True)
            output = open(logs / ("launcher.log" if self.is_srun else "rank-0.log"), "ab")  # noqa: SIM115
        except OSError as error:
            raise MegagammaError(f"{logs}: cannot be written ({error.strerror}): {advice(error)}") from error
        before, ended = self.log.newest_step(), self.log.ends()
        job = {"job": self.job.id, "restart": self.job.restarts, "nodes": self.job.nodes} if self.job else {}
        words = [word.replace("{logs}", str(logs.absolute())) for word in self.command]
        self.log.write(
            "start", number, chain=self.chain, fingerprint=mark, checkpoint=before, command=words, pid=os.getpid(),
            host=socket.gethostname(), **job,
        )  # fmt: skip
        whence = "the beginning" if before is None else f"step {before}"
        self._say(f"attempt {number}, from {whence}; logs in {logs}")
        began = time.monotonic()
        with output:
            try:
                child = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                    env={**os.environ, "MEGAGAMMA_LOGS": str(logs.absolute())},
                )  # fmt: skip
            except OSError as error:
                self.log.write("end", number, code=2, kind="refused", seconds=0.0, checkpoint=before)
                raise ConfigurationError(
                    f"{words[0]}: cannot be started ({error.strerror}): check the command"
                ) from error
        watch = _Watch(self, child, number, logs)
        hung = watch.until_end()
        code = child.returncode if child.returncode >= 0 else 128 - child.returncode
        kind: Kind = "hung" if hung and self.stop is None else kind_of(code, self.stop, logs)
        if self.log.ends() > ended:
            kind = (
                "done"  # what went wrong after that, such as a signal or a crash of a library at exit, changes nothing
            )
        attempt = Attempt(number, self.chain, mark, kind, code, before, self.log.newest_step())
        seconds = time.monotonic() - began
        self.log.write("end", number, code=code, kind=kind, seconds=seconds, checkpoint=attempt.after)
        self._say(f"attempt {number} ended with exit code {code} after {seconds:.0f} s: {kind}")
        return attempt

    def _take_signals(self, watch: _Watch | None) -> None:
        """Act on the signals that came since the last call."""
        while self.requests.received:
            number = self.requests.received.pop(0)
            name = signal.Signals(number).name
            again = self.stop is not None
            if not again:
                self.stop = "preempted" if number == signal.SIGUSR1 else "stopped"
                self._say(f"{name}: asking the run to save and stop" if watch else f"{name}")
            if watch is not None:
                self.log.write("signal", watch.number, signal=name, kind=self.stop)
                # SLURM itself ends what it has asked to stop; a user who asks twice does not want to wait.
                if again and self.job is None and number in (signal.SIGTERM, signal.SIGINT):
                    watch.kill()

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"supervise: {text}", flush=True)


class _Watch:
    """The processes of one attempt."""

    def __init__(self, supervisor: Supervisor, child: subprocess.Popen[bytes], number: int, logs: Path) -> None:
        self.supervisor, self.child, self.number, self.logs = supervisor, child, number, logs
        self.folder = supervisor.folder
        self._tails = [_Tail(logs / name) for name in ("launcher.log", "rank-0.log", "node-0.log")]
        self._seen, self._since = self._progress(), time.monotonic()

    def until_end(self) -> bool:
        """Wait for the launcher to end; returns whether the ranks hung and were killed."""
        supervisor, hung, asked = self.supervisor, False, 0.0
        allowed = supervisor.rules.hang_minutes * 60
        look, looked = min(5.0, allowed / 10), time.monotonic()
        while self.child.poll() is None:
            supervisor._take_signals(self)
            now = time.monotonic()
            if supervisor.stop is not None and now - asked > _REPEAT:
                asked = now
                self.send(signal.SIGUSR1)
            if allowed and now - looked >= look:
                looked = now
                seen = self._progress()
                if seen != self._seen:
                    self._seen, self._since = seen, now
                elif now - self._since > allowed:
                    hung = True
                    self._report_hang(now - self._since)
                    self.kill()
            self._pump()
            time.sleep(_POLL)
        self._pump()
        if not supervisor.is_srun:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, signal.SIGKILL)  # what a launcher that was killed left behind
        return hung

    def _pump(self) -> None:
        for tail in self._tails:
            tail.pump()

    def _progress(self) -> tuple[object, ...]:
        """Something that changes with every step, event and write of a checkpoint."""
        seen: list[object] = []
        for path in (self.folder.metrics_file, self.folder.events_file):
            with contextlib.suppress(OSError):
                state = path.stat()
                seen.append((state.st_ino, state.st_size))
        with contextlib.suppress(OSError):
            for folder in sorted(self.folder.checkpoints.iterdir()):
                seen.append(folder.name)
                if folder.name.startswith("."):
                    seen += [(file.name, file.stat().st_size) for file in sorted(folder.iterdir())]
        return tuple(seen)

    def _local_ranks(self) -> list[int]:
        """Processes of the ranks that have said who they are. Without srun all of them are on this host."""
        return [stack.pid for stack in read_stacks(self.logs) if stack.pid]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank, and not to the launchers above them, which it would end.

        srun forwards it to its tasks on all nodes. A command that is no training of ours gets it itself.
        """
        ranks = [self.child.pid] if self.supervisor.is_srun else self._local_ranks() or [self.child.pid]
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def _report_hang(self, seconds: float) -> None:
        """Ask every rank for its stack, and say whom the others wait for."""
        supervisor = self.supervisor
        stacks = read_stacks(self.logs)
        if stacks:
            self.send(signal.SIGUSR2)
            end = time.monotonic() + min(_STACKS, supervisor.rules.hang_minutes * 60)
            while time.monotonic() < end and any(stack.frames is None for stack in stacks):
                time.sleep(_POLL)
                stacks = read_stacks(self.logs)
        silent = silent_ranks(stacks)
        supervisor._say(f"no step, event or checkpoint for {seconds / 60:.3g} minutes; {_named(stacks, silent)}")
        supervisor.log.write(
            "hang", self.number, seconds=seconds, ranks=[stack.rank for stack in silent], hosts=[s.host for s in silent],
            places=[stack.place() for stack in silent], answered=sum(stack.frames is not None for stack in stacks),
            of=len(stacks),
        )  # fmt: skip

    def kill(self) -> None:
        """End every rank at once, then the launcher."""
        if self.supervisor.is_srun:
            # srun kills its tasks, on all nodes, when it is asked to end.
            self.child.send_signal(signal.SIGTERM)
        else:
            for pid in self._local_ranks():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, signal.SIGKILL)
        try:
            self.child.wait(_KILL)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


def _named(stacks: Sequence[RankStack], silent: Sequence[RankStack]) -> str:
    if not stacks:
        return "no rank had started"
    if not silent:
        return f"none of {len(stacks)} ranks stands out: see the .stack files among the logs"
    shown = "; ".join(f"{stack.who}, {stack.place()}" for stack in silent[:8])
    return f"{len(silent)} of {len(stacks)} ranks hold up the others: {shown}{'; ...' if len(silent) > 8 else ''}"
