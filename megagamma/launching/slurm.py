"""SLURM's commands, with errors that say what to do. Nothing is remembered between calls."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagamma.environment import slurm_job
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.launching.sbatch_options import gpus_per_node, parse, value_of

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
"""States of a job that will not run again. PREEMPTED and REQUEUED ones will."""

_SECONDS = 60  # for an answer of the controller
_LOGIN_NODE = "submit from a login node: tools/sweep.py submit SWEEP.yaml, or sbatch launch/pretrain.sbatch ..."


class SlurmError(MegagammaError):
    """SLURM is not there, does not answer, or refuses a request."""


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a SLURM command: without the job that it may itself be part of, whose sizes would be
    taken for requests. SBATCH_* stay: they are the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    return {**kept, **(more or {})}


def _run(words: Sequence[str], more: Mapping[str, str] | None = None, check: bool = True) -> str:
    """Output of a SLURM command.

    Raises:
        SlurmError: it is not installed, gives no answer, or fails.
    """
    try:
        done = subprocess.run(
            list(words), env=_environment(more), capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{words[0]}: not installed here: run this on a machine of the cluster, or train without SLURM "
            "(tools/sweep.py run, torchrun, python)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{words[0]}: no answer in {_SECONDS} s: try again when SLURM's controller is back") from error
    if check and done.returncode:
        raise _Refused(words, done.stderr)
    return done.stdout


class _Refused(SlurmError):
    """A command that SLURM refused."""

    def __init__(self, words: Sequence[str], said: str) -> None:
        self.said = said
        lines = [re.sub(r"^\w+: (?:(?:error|fatal): )?", "", line) for line in said.splitlines()]
        super().__init__(f"{words[0]} was refused: {'; '.join(line for line in lines if line) or 'without a reason'}")


# -- what the cluster has ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """A partition and its largest jobs."""

    name: str
    is_default: bool
    nodes: int
    max_nodes: int
    """Per job."""
    cpus: int
    """Per node, of the largest node."""
    gpus: int
    """Per node, of the largest node."""
    minutes: float
    """Longest time of a job; infinite without a limit. Unit: minutes."""


_CLOCK = re.compile(r"(?:(\d+)-)?(\d+(?::\d+){0,2})")


def minutes_of(text: str) -> float:
    """A time of SLURM's, such as D-HH:MM:SS, HH:MM:SS or minutes; infinite where it is none. Unit: minutes."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return float("inf")
    parts = [int(part) for part in match[2].split(":")]
    if match[1]:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = [*[0] * (3 - len(parts)), *parts] if len(parts) > 1 else [0, parts[0], 0]
    return int(match[1] or 0) * 1440 + hours * 60 + minutes + seconds / 60


def partitions() -> dict[str, Partition]:
    """The partitions of this cluster, by name.

    Raises:
        SlurmError: SLURM is not there or does not answer.
    """
    text = _run(["sinfo", "--noheader", "--format=%P|%D|%c|%G|%l|%s"])
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        title, nodes, cpus, gres, limit, sizes = line.split("|")
        name, is_default = title.rstrip("*"), title.endswith("*")
        gpus = [int(match[1]) for match in re.finditer(r"gpu:(?:[^,(]*:)?(\d+)", gres)]
        largest = sizes.rpartition("-")[2]
        before = found.get(name, Partition(name, is_default, 0, 0, 0, 0, minutes_of(limit)))
        count = before.nodes + int(nodes)
        found[name] = Partition(
            name, is_default, count, min(count, int(largest)) if largest.isdigit() else count,
            max(before.cpus, int(cpus.rstrip("+"))), max([before.gpus, *gpus]), before.minutes,
        )  # fmt: skip
    return found


def check_request(
    partition: str | None, nodes: int, gpus_per_node: int = 0, time: str = "", time_from: str = "--time"
) -> Partition:
    """The partition that a job would run in, when it can have what it asks for.

    Args:
        partition: its name, or several with commas, of which one that is large enough is returned; the cluster's default
            when None.
        time: time limit as sbatch takes it; empty: the partition's.
        time_from: where the limit is set, for messages.

    Raises:
        ConfigurationError: there is no such partition, or it is too small.
    """
    known = partitions()
    names = " or ".join(sorted(known)) or "none: the cluster has no partition"
    if partition is None:
        chosen = [one for one in known.values() if one.is_default]
        if not chosen:
            raise ConfigurationError(f"--partition: this cluster has no default partition: use {names}")
    else:
        for name in partition.split(","):
            if name not in known:
                raise ConfigurationError(f"--partition={name}: this cluster has no such partition: use {names}")
        chosen = [known[name] for name in partition.split(",")]
    refusals = []
    for one in chosen:
        refusal = _refusal(one, nodes, gpus_per_node, time, time_from)
        if not refusal:
            return one
        refusals.append(refusal)
    raise ConfigurationError("; ".join(refusals))


def _refusal(one: Partition, nodes: int, gpus: int, time: str, time_from: str) -> str:
    if nodes > one.max_nodes:
        return f"--nodes={nodes}: partition {one.name} gives a job at most {one.max_nodes} nodes: ask for fewer"
    if gpus > one.gpus:
        return f"--gpus-per-node={gpus}: nodes of partition {one.name} have {one.gpus} GPUs: ask for fewer"
    if time and _CLOCK.fullmatch(time) and minutes_of(time) > one.minutes:
        return (
            f"{time_from}={time}: partition {one.name} gives a job at most {one.minutes:g} minutes: ask for less, or for "
            "another partition: what is not finished then is saved, and resumed in the next start"
        )
    return ""


# -- submitting --------------------------------------------------------------------------------------------------


def submit(
    script: str | Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> str:
    """Submit a batch script; returns the job's number.

    Args:
        options: of sbatch.
        environment: variables that the job gets besides this process's own.
        arguments: of the script.

    Raises:
        SlurmError, ConfigurationError: sbatch is not installed, or refuses.
    """
    # SLURM accepts some jobs that can never run, and lets them wait for ever.
    check_submission(script, options, environment, arguments)
    words = ["sbatch", "--parsable", *options, str(script), *arguments]
    return _explained(words, options, environment).strip().partition(";")[0]


def check_submission(
    script: str | Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> None:
    """Ask SLURM whether it would take a job, without submitting it.

    Raises:
        SlurmError, ConfigurationError: it would not.
    """
    _explained(["sbatch", "--test-only", *options, str(script), *arguments], options, environment)


def _explained(words: Sequence[str], options: Sequence[str], environment: Mapping[str, str] | None) -> str:
    try:
        return _run(words, environment)
    except _Refused as error:
        said, pairs = error.said.lower(), parse(options)
        partition = value_of(pairs, "partition") or os.environ.get("SBATCH_PARTITION") or None
        if "partition" in said and "invalid" in said:
            check_request(partition, 1)
        if "node count" in said or "node configuration" in said or "more processors" in said:
            nodes = value_of(pairs, "nodes") or ""
            check_request(partition, int(nodes) if nodes.isdigit() else 1, gpus_per_node(pairs) or 0)
        # A site that forbids it says so in its own words; so the place is named whatever they are.
        if slurm_job() is not None:
            raise SlurmError(f"{error}; this is inside a job, where a site may forbid sbatch: {_LOGIN_NODE}") from error
        raise


# -- jobs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobState:
    """A job, or one task of an array."""

    id: str
    """NUMBER, or NUMBER_TASK."""
    state: str
    """As SLURM names it: PENDING, RUNNING, COMPLETED, ..."""
    reason: str
    """Why it waits or ended, in SLURM's word."""
    name: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again."""
        return self.state in ENDED


def jobs(numbers: Iterable[str]) -> dict[str, JobState]:
    """The jobs that SLURM still knows, with every task of an array, by NUMBER or NUMBER_TASK.

    Raises:
        SlurmError: SLURM is not there or does not answer.
    """
    wanted = ",".join(dict.fromkeys(numbers))
    if not wanted:
        return {}
    words = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%j", f"--jobs={wanted}"]
    try:
        text = _run(words)
    except _Refused as error:
        if "invalid job id" in error.said.lower():
            return {}
        raise
    fields = (line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3)
    return {number: JobState(number, state, reason, name) for number, state, reason, name in fields}


def job_fields(number: str) -> dict[str, str]:
    """What `scontrol show job` says of a job; empty when SLURM does not know it or does not answer."""
    try:
        text = _run(["scontrol", "--oneliner", "show", "job", number])
    except SlurmError:
        return {}
    first = text.splitlines()[0] if text.strip() else ""
    return dict(re.findall(r"(?:^| )(\w+)=(\S*)", first))


def requeue(number: str) -> None:
    """Put a running job back into the queue.

    Raises:
        SlurmError: SLURM refuses, as of a job that was submitted with --no-requeue.
    """
    _run(["scontrol", "requeue", number])


def cancel(numbers: Iterable[str]) -> None:
    """Cancel jobs.

    Raises:
        SlurmError: SLURM refuses.
    """
    _run(["scancel", *numbers])


def send_signal(number: str, name: str, whole: bool = False) -> None:
    """Send a signal to the batch script of a job, and to nothing else of it.

    Args:
        name: such as USR1.
        whole: to all processes of the job as well.

    Raises:
        SlurmError: SLURM refuses.
    """
    _run(["scancel", "--full" if whole else "--batch", f"--signal={name}", number])


def nodes_answer(count: int, seconds: float) -> bool:
    """Whether every node of this process's own allocation can run a task."""
    words = [
        "srun",
        "--quiet",
        "--export=ALL",
        f"--nodes={count}",
        f"--ntasks={count}",
        "--ntasks-per-node=1",
        "--overlap",
        "true",
    ]
    try:
        return subprocess.run(words, capture_output=True, timeout=seconds, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
