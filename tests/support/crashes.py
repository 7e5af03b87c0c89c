"""Stopping a program between any two of its file operations, and what is there then.

Python announces every open, rename, remove, mkdir, rmdir, chmod and link to audit hooks. In a forked child a hook ends
the process at the n-th of them, so that nothing unwinds, as a kill does. For n = 1, 2, ... until the program comes to
its end, the folder is looked at from outside. The exchange of two names is announced too, as the look-up of the
function that makes it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from support.forked import context

_STOPPED = 77
_CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_DIRECTORY


class Case:
    """A program that publishes, and how its result is judged."""

    def build(self, base: Path) -> None:
        """Write the old state."""
        raise NotImplementedError

    def act(self, folder: Path) -> None:
        """Publish the new state over the old."""
        raise NotImplementedError

    def recover(self, folder: Path) -> None:
        """What the next start does first."""
        raise NotImplementedError

    def state(self, folder: Path) -> str:
        """ "old" or "new" for what is complete and valid under the final name, "missing" for no such name, else why not."""
        raise NotImplementedError

    def clean_names(self) -> list[str]:
        """What is in the folder when all is done."""
        raise NotImplementedError

    stranger: bytes = b"precious"
    """Content of every file that is not this tool's own."""
    strangers: int = 0


@dataclass
class Outcome:
    """Of all points at which a program was stopped."""

    points: int = 0
    """File operations of the program."""
    stopped: int = 0
    states: dict[str, int] = field(default_factory=dict)
    """How often each was seen after the recovery."""
    set_aside: int = 0
    """How often the final name was not there before the recovery."""
    problems: list[str] = field(default_factory=list)


def _fork(action: Any, folder: Path, stop_at: int, errors: Path) -> tuple[int, int]:
    """Run an action in a child; returns its exit code and how many file operations it made."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        with open(reader, "rb") as pipe:
            seen = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(seen or b"0")
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not ((isinstance(path, str | bytes | os.PathLike) and flags & _WRITING) or _is_folder(path)):
                return
        elif event == "ctypes.dlsym":
            path = folder if arguments[1] == "renameat2" else "/"
        elif event in _CHANGING:
            path = arguments[0]
        else:
            return
        # Paths relative to an open folder are those of a folder that is deleted.
        text = os.fsdecode(path)
        if os.path.isabs(text) and not text.startswith(str(folder)):
            return
        count += 1
        if count == stop_at:
            os._exit(_STOPPED)

    code = 1
    try:
        sys.addaudithook(hook)
        action(folder)
        code = 0
    except BaseException:  # noqa: BLE001 - reported by the parent
        errors.write_text(traceback.format_exc())
    finally:
        os.write(writer, str(count).encode())
        os._exit(code)


def _names(folder: Path) -> list[str]:
    """Without the files of locks: one of a process that is gone holds nothing, and the next that locks takes it away."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def _failure(action: Any, folder: Path) -> str:
    """The traceback of an action that fails; empty if it does not."""
    try:
        action(folder)
    except Exception:  # noqa: BLE001 - reported
        return traceback.format_exc()
    return ""


def _is_folder(path: Any) -> bool:
    """Opened to be synced: a point of its own, between what was written and its name."""
    return isinstance(path, str | bytes | os.PathLike) and os.path.isdir(path)


def _strangers(folder: Path, content: bytes) -> int:
    return sum(path.is_file() and path.read_bytes() == content for path in folder.rglob("*"))


def stop_everywhere(case: Case, work: Path, stride: int = 1, exchange: bool = True) -> Outcome:
    """Stop a program at its n-th file operation for every n (each `stride`-th), and look what is there.

    Args:
        exchange: whether the file system can exchange names, so that the final name must never be missing.
    """
    base, errors, outcome = work / "base", work / "errors", Outcome()
    base.mkdir(parents=True)
    case.build(base)
    found = case.state(base)
    assert found == "old", f"before anything was done: {found}"
    folder = work / "copy"
    shutil.copytree(base, folder, symlinks=True)
    code, outcome.points = _fork(case.act, folder, 0, errors)
    assert code == 0, errors.read_text()
    found = case.state(folder)
    assert found == "new", f"without a stop: {found}"
    for number in range(1, outcome.points + 1, stride):
        shutil.rmtree(folder)
        shutil.copytree(base, folder, symlinks=True)

        def note(text: str, number: int = number) -> None:
            outcome.problems.append(f"stopped before operation {number} of {outcome.points}: {text}")

        code, _ = _fork(case.act, folder, number, errors)
        if code != _STOPPED:
            note(f"was not stopped, code {code}")
            continue
        outcome.stopped += 1
        state = case.state(folder)
        outcome.set_aside += state == "missing"
        if state not in (("old", "new") if exchange else ("old", "new", "missing")):
            note(f"before the next start: {state}")
        if _strangers(folder, case.stranger) != case.strangers:
            note("before the next start: a stranger is lost")
        failed = _failure(case.recover, folder)
        state = case.state(folder)
        outcome.states[state] = outcome.states.get(state, 0) + 1
        if failed or state not in ("old", "new"):
            note(f"after the recovery: {state} {failed}")
        if _strangers(folder, case.stranger) != case.strangers:
            note("after the recovery: a stranger is lost")
        failed = _failure(case.act, folder)
        state = case.state(folder)
        if failed or state != "new":
            note(f"done again: {state} {failed}")
        elif (names := _names(folder)) != case.clean_names():
            note(f"done again: left over {names}")
        elif _strangers(folder, case.stranger) != case.strangers:
            note("done again: a stranger is lost")
    return outcome


def _serve(case: Case, work: Path, stride: int, way: str, result: Path) -> None:
    """In a process of its own, which forks: replace what a way replaces, and write the outcome to a file."""
    import logging

    from megagamma import folders

    # A process that stops loses nothing that the kernel has; only a machine that stops does.
    os.fsync = lambda _: None  # type: ignore[assignment]
    # Warnings of expected refusals belong on no console.
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if way != "exchange":
        folders.exchange = lambda one, other: False
    if way == "delete first":
        _publish_wrongly(_delete_first)
    if way == "delete all":
        folders.discard = lambda folder, successor=None: shutil.rmtree(folder) or []
    try:
        outcome = stop_everywhere(case, work, stride, exchange=way == "exchange")
        result.write_text(json.dumps(asdict(outcome)))
    except BaseException:  # noqa: BLE001 - reported by the test
        result.write_text(json.dumps({"problems": [traceback.format_exc()]}))


def _delete_first(partial: Path, final: Path, replace: bool = True) -> None:
    """How it is not done."""
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _publish_wrongly(function: Any) -> None:
    """Put it in every module that publishes."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("megagamma") and hasattr(module, "publish_directory"):
            module.publish_directory = function  # type: ignore[attr-defined]


def outcome_of(case: Case, work: Path, way: str = "exchange", stride: int = 1) -> Outcome:
    """`stop_everywhere` in a process with nothing but the imports, so that forks of it are cheap and safe.

    Args:
        way: "exchange"; "set aside", as on a file system that cannot exchange names; or a mistake, for the negative
            controls: "delete first" (the old folder goes before the new one has its name) or "delete all" (strangers too).
    """
    server: ForkServerContext = context()
    work.mkdir(parents=True)
    process = server.Process(target=_serve, args=(case, work, stride, way, work / "result.json"))
    process.start()
    process.join(500)
    return Outcome(**json.loads((work / "result.json").read_text()))
