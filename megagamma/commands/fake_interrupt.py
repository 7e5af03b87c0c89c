"""Interrupt a run as a scheduler would, to see it save, stop and resume: a preemption, or the end of a job's time.

    megagamma fake_interrupt preemption 4711            # a SLURM job of launch/pretrain.sbatch
    megagamma fake_interrupt timeout 4711_3             # task 3 of an array
    megagamma fake_interrupt preemption --folder runs/mine      # a `megagamma supervise` on this machine, without SLURM

A preemption is SIGUSR1 to the batch script. A timeout is the same, and SIGTERM and SIGKILL to all of the job when it is
still there after the lead time. Exit codes: 0 when the run stopped in time; 1 when it did not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from megagamma.errors import ConfigurationError
from megagamma.launching import slurm
from megagamma.runs.folder import RunFolder

_KILL_WAIT = 30.0  # between SIGTERM and SIGKILL, as SLURM's default KillWait


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megagamma fake_interrupt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["preemption", "timeout"], help="what to fake")
    parser.add_argument("job", nargs="?", help="number of a SLURM job, or NUMBER_TASK of an array")
    parser.add_argument("--folder", type=Path, help="in place of JOB: run of a supervisor on this machine")
    parser.add_argument(
        "--lead",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="from the signal to the limit (default %(default)s)",
    )
    return parser


def _attempts(folder: RunFolder) -> list[tuple[str, int]]:
    return [(str(line.get("event")), int(line.get("attempt", 0))) for line in folder.attempts().read()]


def _supervisor_of(folder: RunFolder) -> int:
    """Process of the supervisor of a run.

    Raises:
        ConfigurationError: none is at work there on this machine.
    """
    starts = [line for line in folder.attempts().read() if line.get("event") == "start"]
    if not starts:
        raise ConfigurationError(
            f"--folder={folder.path}: no supervisor has started this run: start it with tools/supervise.py"
        )
    pid, host = int(starts[-1].get("pid", 0)), starts[-1].get("host")
    try:
        if not pid or host != socket.gethostname():
            raise ProcessLookupError
        os.kill(pid, 0)
    except ProcessLookupError as error:
        raise ConfigurationError(
            f"--folder={folder.path}: its supervisor, process {pid} on {host}, is not at work on this machine: start the "
            "run first, or give the number of its SLURM job"
        ) from error
    return pid


def _wait(condition: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until it holds; None when it does not in time."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if condition():
            return time.monotonic() - began
        time.sleep(0.2)
    return None


def _interrupt_folder(folder: RunFolder, kind: str, lead: float) -> int:
    pid, before = _supervisor_of(folder), len(_attempts(folder))
    os.kill(pid, signal.SIGUSR1)
    print(f"SIGUSR1 to the supervisor, process {pid}", flush=True)

    def ended() -> bool:
        return any(event == "end" for event, _ in _attempts(folder)[before:])

    seconds = _wait(ended, lead)
    if seconds is not None:
        print(f"saved and stopped after {seconds:.1f} s; the supervisor starts it again: see {folder.attempts_file}")
        return 0
    print(f"still there after {lead:g} s")
    if kind == "timeout":
        for number, pause in ((signal.SIGTERM, _KILL_WAIT), (signal.SIGKILL, 0.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                print(f"{number.name} to process {pid}", flush=True)
            if _wait(ended, pause) is not None:
                break
    return 1


def _interrupt_job(number: str, kind: str, lead: float) -> int:
    fields = slurm.job_fields(number)
    if fields.get("JobState") != "RUNNING":
        state = fields.get("JobState", "not known to SLURM")
        raise ConfigurationError(f"JOB={number}: is {state}: give a job that is running (squeue --me)")
    number, restarts = fields["JobId"], fields.get("Restarts", "0")
    slurm.send_signal(number, "USR1")
    print(f"SIGUSR1 to the batch script of job {number}", flush=True)

    def is_over() -> bool:
        now = slurm.job_fields(number)
        return now.get("JobState") != "RUNNING" or now.get("Restarts", "0") != restarts

    seconds = _wait(is_over, lead)
    if seconds is not None:
        state = slurm.job_fields(number).get("JobState", "gone")
        print(
            f"saved and stopped after {seconds:.1f} s; job {number} is {state}: it resumes when SLURM starts it again"
        )
        return 0
    print(f"still running after {lead:g} s")
    if kind == "timeout":
        for name, pause in (("TERM", _KILL_WAIT), ("KILL", 0.0)):
            print(f"SIG{name} to all of job {number}", flush=True)
            slurm.send_signal(number, name, whole=True)
            if _wait(is_over, pause) is not None:
                break
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Interrupt; returns 1 when the run did not stop in time."""
    args = build_parser().parse_args(arguments)
    if (args.job is None) == (args.folder is None):
        raise ConfigurationError("JOB: give the number of a SLURM job, or --folder RUN, one of the two")
    if args.folder is not None:
        return _interrupt_folder(RunFolder(args.folder), args.kind, args.lead)
    return _interrupt_job(args.job, args.kind, args.lead)
