"""Processes that die, hang or are asked to stop, and consoles and folders that go away."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagamma.checkpoint.reader import read_manifest, verify
from megagamma.testing.drill import LARGE, SIGNALS, Drill, last_line, require

ENDLESS = 1_000_000


def _killed(drill: Drill, number: int, reached: int) -> str:
    """A process ended by a signal that leaves it no word; resumed."""
    whole = drill.train(name="whole", steps=40)
    run = drill.start(steps=40)
    run.wait_until(lambda: run.steps() >= reached, f"step {reached}")
    run.send(number)
    codes = run.end()
    require(codes == [-number], f"exit codes {codes}")
    return drill.resumes_like(whole, run, steps=40)


def killed_in_a_step(drill: Drill) -> str:
    """SIGKILL between two checkpoints."""
    return _killed(drill, signal.SIGKILL, drill.random.randrange(5, 25))


def crashed(drill: Drill) -> str:
    """A segmentation fault and an abort: no line of Python runs any more."""
    seen = {
        name: _killed(drill, number, 5) for name, number in (("SIGSEGV", signal.SIGSEGV), ("SIGABRT", signal.SIGABRT))
    }
    return "; ".join(f"{name}: {text}" for name, text in seen.items())


def killed_in_a_save(drill: Drill) -> str:
    """SIGKILL at three random points of saves of 60 MB."""
    options: dict[str, Any] = {"model": LARGE, "steps": 9}
    whole = drill.train(name="whole", **options)
    met = 0
    for _ in range(3):
        run = drill.start(**options)
        root = run.folder.checkpoints
        before = set(root.glob(".step_*")) if root.is_dir() else set()

        def in_a_save(root: Path = root, before: set[Path] = before) -> bool:
            return bool(root.is_dir() and set(root.glob(".step_*.partial")) - before)

        least = drill.random.randrange(1, 3)
        run.wait_until(lambda run=run, least=least: run.steps() >= least, "a step")  # type: ignore[misc]
        run.wait_until(in_a_save, "a save")
        time.sleep(drill.random.uniform(0, 0.05))
        run.kill()
        met += bool(set(root.glob(".step_*.partial")) - before)
        for step in run.folder.steps():
            verify(run.folder.checkpoint(step), read_manifest(run.folder.checkpoint(step)))
    return f"{met} of 3 kills met a save; every checkpoint that was left is valid; " + drill.resumes_like(
        whole, run, **options
    )


def one_rank_killed(drill: Drill) -> str:
    """SIGKILL of one of two ranks; resumed on one."""
    whole = drill.train(name="whole", steps=40)
    run = drill.start(ranks=2, steps=40)
    run.wait_until(lambda: run.steps() >= 6, "step 6")
    run.send(signal.SIGKILL, rank=1)
    codes = run.end()
    require(codes == [2, -9], f"exit codes {codes}")
    require("another rank ended" in run.said and "Traceback" not in run.said, last_line(run.said))
    return "the other rank left with exit code 2; " + drill.resumes_like(whole, run, exact=False, steps=40)


def one_rank_silent(drill: Drill) -> str:
    """SIGSTOP of one of two ranks, which keeps its connections open."""
    run = drill.start("--run.timeout_minutes", "0.1", ranks=2, steps=ENDLESS)
    run.wait_until(lambda: run.steps() >= 4, "step 4")
    run.send(signal.SIGSTOP, rank=1)
    run.ranks[0].join(60)
    code = run.ranks[0].exitcode
    require(
        code == 2 and "gave no answer within run.timeout_minutes" in run.said, f"exit code {code}: {run.said[-300:]}"
    )
    return "given up after run.timeout_minutes, exit code 2"


def asked_to_stop(drill: Drill) -> str:
    """The signals of schedulers and terminals."""
    whole = drill.train(name="whole", steps=40)
    for name, number in SIGNALS.items():
        shutil.rmtree(drill.place / "run", ignore_errors=True)
        run = drill.start("--checkpoint.interval", "0", steps=40)
        run.wait_until(lambda run=run: run.steps() >= 3, "step 3")  # type: ignore[misc]
        run.send(number)
        codes = run.end()
        require(codes == [75], f"{name}: exit codes {codes}: {last_line(run.said)}")
        require(run.folder.steps() == [run.steps()], f"{name}: steps saved {run.folder.steps()}")
        drill.resumes_like(whole, run, "--checkpoint.interval", "0", steps=40)
    return f"{', '.join(SIGNALS)}: saved, exit code 75, resumed to the bit"


def launched_twice(drill: Drill) -> str:
    """A second launch on the folder of a run in progress."""
    first = drill.start(steps=ENDLESS)
    first.wait_until(lambda: first.steps() >= 2, "step 2")
    second = drill.train(expect=2, steps=ENDLESS)
    require(f"in use by process {first.ranks[0].pid}" in second.said, last_line(second.said))
    first.send(signal.SIGTERM)
    require(first.end() == [75], "the first run was disturbed")
    return f"refused with exit code 2 and the first one's process; the first has {len(drill.losses(first))} steps, each once"


def _close_console(_: int) -> None:
    os.close(1)
    os.close(2)


def _full_console(_: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


def _broken_pipe(_: int) -> None:
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)


def console_gone(drill: Drill) -> str:
    """Output closed, on a full disk, or into a pipe that nobody reads."""
    whole = drill.train(name="whole")
    ways: dict[str, Callable[[int], None]] = {"closed": _close_console, "full": _full_console, "pipe": _broken_pipe}
    for name, prepare in ways.items():
        run = drill.train(name=name, prepare=prepare)
        require(drill.losses(run) == drill.losses(whole), f"{name}: other losses")
        require(run.folder.steps() == whole.folder.steps(), f"{name}: steps saved {run.folder.steps()}")
    return "closed, full, broken pipe: trained to the end, exit code 0, the same files"


def folder_renamed(drill: Drill) -> str:
    """The run's folder renamed while it trains."""
    run = drill.start(steps=ENDLESS)
    run.wait_until(lambda: run.steps() >= 3, "step 3")
    run.folder.path.rename(drill.place / "elsewhere")
    codes = run.end()
    require(codes == [2], f"exit codes {codes}: {last_line(run.said)}")
    require(not run.folder.path.exists(), "a second folder was made under the old name")
    return f"stopped with exit code 2: {last_line(run.said)[:120]}"
