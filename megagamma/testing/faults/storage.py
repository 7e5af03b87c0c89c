"""Disks that are full or closed, and updates that are never made."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from megagamma.testing.drill import Drill, Skipped, last_line, require


def _small_files(_: int, limit: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def disk_full(drill: Drill) -> str:
    """A disk that fills up in a save, made by a limit on the size of files."""
    whole = drill.train(name="whole")
    drill.train("--run.steps", "2", steps=2)
    before = _contents(drill.place / "run" / "checkpoints")
    run = drill.train(expect=2, prepare=partial(_small_files, limit=100_000))
    require("cannot be written" in run.said, last_line(run.said))
    after = _contents(drill.place / "run" / "checkpoints")
    require(before.items() <= after.items(), "an earlier checkpoint was touched")
    return "exit code 2, the checkpoint before untouched; " + drill.resumes_like(whole, run)


def disk_full_asynchronous(drill: Drill) -> str:
    """The same in the thread of an asynchronous save."""
    whole = drill.train(name="whole")
    run = drill.train("--checkpoint.asynchronous", "true", expect=2, prepare=partial(_small_files, limit=100_000))
    require(run.folder.steps() == [], f"checkpoints of steps {run.folder.steps()} were published")
    failures = [event for event in run.folder.events().read() if event["event"] == "warning"]
    require(bool(failures), "no warning was noted")
    return f"{len(failures)} warning, then exit code 2; nothing published; " + drill.resumes_like(whole, run)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unwritable(drill: Drill) -> str:
    """A folder without the right to write."""
    if os.geteuid() == 0:
        raise Skipped("root may write everywhere")
    folder = drill.place / "closed"
    folder.mkdir(mode=0o500)
    try:
        run = drill.train("--run.folder", str(folder / "run"), expect=2)
    finally:
        folder.chmod(0o700)
    return f"exit code 2: {last_line(run.said)[:120]}"


def _not_finite(_: int) -> None:
    """Every gradient of this process is NaN."""
    from megagamma.distributed.engine import Engine

    whole = Engine.forward_backward

    def forward_backward(self: Any, *arguments: Any, **options: Any) -> float:
        return whole(self, *arguments, **options) * float("nan")

    Engine.forward_backward = forward_backward  # type: ignore[method-assign]


def never_finite(drill: Drill) -> str:
    """No loss of the run is finite, and the guard may skip."""
    run = drill.train("--guard.on_nan", "skip", "--guard.max_skips", "3", expect=3, steps=20, prepare=_not_finite)
    return f"exit code 3 after {run.steps()} steps: {last_line(run.said)[:120]}"
