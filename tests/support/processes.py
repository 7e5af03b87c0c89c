"""Runs that are expected to fail or to be killed, and what they leave behind."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
SMOKE = ("--config", "configs/smoke.yaml")


def attempt(arguments: list[str], train: bool = False) -> tuple[str, int, str]:
    """Inside a rank: prepare (and train) a smoke run; returns the error's class, exit code and text, or ("", code, "").

    Another kind of exception than the project's own is not caught: it fails the test.
    """
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.errors import MegagammaError
    from megagamma.job import prepare
    from megagamma.job import train as train_job

    try:
        world = world_from_environment()
        config = parse_config([*SMOKE, *arguments], world_size=world.size)
        if train:
            return "", train_job(config, world), ""
        with prepare(config, world):
            return "", 0, ""
    except MegagammaError as error:
        return type(error).__name__, error.exit_code, str(error)
    finally:
        Runtime.close_groups()


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; a last one that is still being written is left out."""
    from megagamma.files import JsonLines

    return JsonLines(folder / "metrics.jsonl").read()


def losses(folder: Path) -> list[float]:
    """Losses of steps 1, 2, ...; every step must be there once."""
    found = metrics(folder)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [line["loss"] for line in found]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's variables. One thread, so that sums are added in one order."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def command(launcher: str = "python") -> list[str]:
    """The start of a command line that trains, on one process or two."""
    beside, port = Path(sys.executable).parent, str(free_port())
    starts = {
        "python": [sys.executable],
        "torchrun": [str(beside / "torchrun"), "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": [str(beside / "deepspeed"), "--num_gpus", "2", "--master_port", port],
    }
    return [*starts[launcher], str(ROOT / "megagamma" / "pretrain.py"), *SMOKE]


def start(arguments: list[str], launcher: str = "python", **more: str) -> subprocess.Popen[str]:
    """Start a run through its command line, in a session of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.Popen(
        [*command(launcher), *arguments], cwd=ROOT, env=environment(PATH=path, **more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Wait for a run; returns its exit code, output and error output. A run that does not end is killed and fails."""
    import signal

    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"did not end in {seconds} s:\n{out[-2000:]}\n{err[-2000:]}") from error
    return process.returncode, out, err


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 90) -> Any:
    """Poll quickly until the condition holds; fails when the process ends or the time is over."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if process.poll() is not None:
            out, err = process.communicate()
            raise AssertionError(f"ended early with {process.returncode}:\n{out[-2000:]}\n{err[-2000:]}")
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)
    return value


def attempt_with_signal(arguments: list[str], number: int, rank: int, lines: int) -> tuple[str, int, str]:
    """Inside a rank: train; as soon as metrics.jsonl has `lines` lines, `rank` sends itself the signal."""
    import threading

    folder = Path(arguments[arguments.index("--run.folder") + 1])

    def watch() -> None:
        while len(metrics(folder)) < lines:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    if int(os.environ["RANK"]) == rank:
        threading.Thread(target=watch, daemon=True).start()
    return attempt(arguments, train=True)


def attempt_with_small_files(arguments: list[str], limit: int) -> tuple[str, int, str]:
    """Inside a rank: train, while no file may grow beyond `limit` bytes: a full disk that needs no rights to mount one."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return attempt(arguments, train=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def attempt_with_wandb(arguments: list[str]) -> tuple[str, int, str]:
    """Inside a rank: train with wandb, whose service is ended with the run."""
    import wandb

    try:
        return attempt(arguments, train=True)
    finally:
        wandb.teardown()


def attempt_with_broken_wandb(arguments: list[str], place: str) -> tuple[tuple[str, int, str], str]:
    """Inside a rank: train while wandb fails at `place`; returns also what was said on standard error."""
    import contextlib
    import io
    from unittest import mock

    import wandb

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{place} is broken")

    run = mock.Mock()
    if place != "init":
        setattr(run, place, fail)
    said = io.StringIO()
    with (
        mock.patch.object(wandb, "init", fail if place == "init" else lambda **_: run),
        contextlib.redirect_stderr(said),
    ):
        return attempt(arguments, train=True), said.getvalue()
