"""Stacks of the ranks of a run that hangs, and which rank the others wait for.

Each rank opens a file of its own when it starts (`offer_stacks`), whose first line says who it is. On SIGUSR2 the stack of
every thread is appended, by a handler in C, so that a rank that sleeps in a library answers too. A rank that is stopped,
or in the kernel, does not.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagamma.environment import launcher_rank, logs_folder

_NAME = re.compile(r"rank-(\d+)\.stack")
_FRAME = re.compile(r'  File "(.*)", line \d+ in (.*)')
# Inside one of these a rank waits for the others.
_WAITING = re.compile(r"torch/distributed/|megatron/core/pipeline_parallel/p2p_communication")
_INNERMOST = 6  # frames by which two stacks are compared


def offer_stacks() -> None:
    """From here on SIGUSR2 makes this process write the stack of every thread, instead of ending it.

    Into LOGS/rank-R.stack where a supervisor says where (MEGAGAMMA_LOGS), else on standard error.
    """
    folder = logs_folder()
    try:
        if folder is None:
            faulthandler.register(signal.SIGUSR2, all_threads=True)
            return
        rank = launcher_rank()
        file = open(folder / f"rank-{rank}.stack", "w", encoding="utf-8")  # noqa: SIM115 - the handler keeps it
        file.write(f"rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
        file.flush()
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    except (OSError, ValueError, RuntimeError, AttributeError):
        return  # no standard error, or a disk that is full: training matters more


@dataclass(frozen=True)
class RankStack:
    """What one rank answered."""

    rank: int
    who: str
    """Rank, host and process, in words."""
    host: str
    pid: int
    frames: tuple[tuple[str, str], ...] | None
    """(file, function) of its main thread's last answer, innermost first; None without an answer."""

    @property
    def waits(self) -> bool:
        """Whether the main thread is inside a collective operation."""
        return any(_WAITING.search(file) for file, _ in self.frames or ())

    def place(self) -> str:
        """Where the main thread is, as function and file."""
        if not self.frames:
            return "gave no stack: stopped, or stuck in the kernel"
        file, function = self.frames[0]
        return f"is in {function} ({file})"


def read_stacks(logs: Path) -> list[RankStack]:
    """The answers of all ranks that have started, by rank."""
    found = []
    for path in logs.glob("rank-*.stack"):
        name = _NAME.fullmatch(path.name)
        if name is None:
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        about = re.fullmatch(r"rank \d+ on (.*), process (\d+)", lines[0]) if lines else None
        host, pid = (about[1], int(about[2])) if about else ("", 0)
        who = lines[0] if about else f"rank {name[1]}"
        found.append(RankStack(int(name[1]), who, host, pid, _main_thread(lines)))
    return sorted(found, key=lambda stack: stack.rank)


def _main_thread(lines: Sequence[str]) -> tuple[tuple[str, str], ...] | None:
    """Frames of the last stack's main thread: faulthandler writes it last, and threads begin with "Thread" or "Current"."""
    heads = [i for i, line in enumerate(lines) if line.startswith(("Thread 0x", "Current thread 0x"))]
    if not heads:
        return None
    frames = (_FRAME.fullmatch(line) for line in lines[heads[-1] + 1 :])
    return tuple((frame[1], frame[2]) for frame in frames if frame)


def silent_ranks(stacks: Sequence[RankStack]) -> list[RankStack]:
    """The ranks that the others wait for.

    Those without an answer; else those that are not inside a collective operation, where others are; else, as on a GPU,
    where ranks wait for the device, those whose stack is not that of most.
    """
    mute = [stack for stack in stacks if stack.frames is None]
    if mute:
        return mute
    waiting = [stack for stack in stacks if stack.waits]
    if waiting and len(waiting) < len(stacks):
        return [stack for stack in stacks if not stack.waits]
    if len(stacks) == 1:
        return list(stacks)
    common = Counter((stack.frames or ())[:_INNERMOST] for stack in stacks).most_common(1)
    frames, count = common[0] if common else ((), 0)
    return [stack for stack in stacks if (stack.frames or ())[:_INNERMOST] != frames] if 2 * count > len(stacks) else []
