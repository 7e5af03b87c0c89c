"""Atomic writes: a file or folder under its final name is complete, or it is not there.

A folder is written under a hidden name beside its place, `.NAME.partial`, and renamed when it is complete. A folder
that it replaces is set aside as `.NAME.replaced` for the moment of the rename.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.reading import Unreadable, read_json_value


def sync_folder(folder: str | Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A temporary file beside `path`, which takes its name, complete and synced, when the block ends well.

    Args:
        mode: "w" for UTF-8 text, "wb" for bytes.

    Raises:
        MegagammaError: the folder cannot be written or the disk is full. After any error what was there stays.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        encoding = None if "b" in mode else "utf-8"
        with tempfile.NamedTemporaryFile(
            mode, encoding=encoding, dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise MegagammaError(f"{path}: cannot be written ({error.strerror}): {advice(error)}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically, as UTF-8.

    Raises:
        MegagammaError: the folder cannot be written or the disk is full; what was there stays.
    """
    with atomic_file(path) as file:
        file.write(text)


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy a file atomically.

    Raises:
        MegagammaError: it cannot be written; what was there stays.
    """
    with atomic_file(path, "wb") as file, open(source, "rb") as content:
        shutil.copyfileobj(content, file)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        MegagammaError: it is missing, cannot be read, or is no JSON object.
    """
    try:
        value = read_json_value(path, finite=False)  # `write_json` writes NaN
    except (OSError, Unreadable) as error:
        raise MegagammaError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise MegagammaError(f"{path}: cannot be read: must be a JSON object, not {type(value).__name__}")
    return value


def advice(error: OSError) -> str:
    """What a user can do about a file that cannot be written."""
    hints = {
        errno.ENOSPC: "free some space on the disk or choose another folder",
        errno.EDQUOT: "the quota is used up: free some space or choose another folder",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "give yourself the right to write there or choose another folder",
        errno.ENOENT: "check the path",
        errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
        errno.ENFILE: "too many files are open on this machine: close some",
        errno.ENOMEM: "the machine's memory is used up: free some",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ENOTDIR: "a file stands where a folder is needed: choose another folder",
        errno.EEXIST: "a file stands where a folder is needed: choose another folder",
    }
    return hints.get(error.errno or 0, "choose another folder")


def require_writable(folder: str | Path, option: str) -> Path:
    """Create a folder and prove that a file can be written in it.

    Raises:
        MegagammaError: naming the option, the folder and the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable.") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise MegagammaError(f"{option}={folder}: cannot be written ({error.strerror}): {advice(error)}") from error
    return folder


def _finite(value: Any) -> Any:
    """A JSON value with null in place of numbers that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _step_of(values: dict[str, Any]) -> float:
    step = values.get("step", 0)
    return step if isinstance(step, int | float) else 0


class JsonLines:
    """A file of JSON objects, one a line, that survives a kill: each line is written whole and flushed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def read(self) -> list[dict[str, Any]]:
        """The objects of the file; empty when there is none. A reader may come while a run writes.

        A line that is no JSON object is left out: the last one may be half written, now or since a kill.

        Raises:
            MegagammaError: the file is there and cannot be read.
        """
        return [values for _, values in self._valid_lines()]

    def keep_until(self, step: int) -> None:
        """Drop lines of later steps, and a line that a kill cut off, so that a resumed run repeats nothing.

        Raises:
            MegagammaError: the file cannot be read or written.
        """
        if self.path.exists():
            kept = [line for line, values in self._valid_lines() if _step_of(values) <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Append one object. A number that is not finite becomes null, as JSON has no word for it.

        Raises:
            MegagammaError: the file cannot be written.
        """
        line = json.dumps(_finite(values)) + "\n"
        try:
            if self._file is None:
                # A line that a kill cut off must not swallow the next one.
                line = line if self._ends_its_line() else "\n" + line
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - kept open for the run
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise MegagammaError(f"{self.path}: cannot be written ({error.strerror}): {advice(error)}") from error

    def close(self) -> None:
        """Close the file; a later `write` opens it again."""
        if self._file is not None:
            # What could not be written was an error then; here it would hide that one.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _valid_lines(self) -> list[tuple[str, dict[str, Any]]]:
        try:
            # A cut may go through a character.
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise MegagammaError(f"{self.path}: cannot be read ({error.strerror})") from error
        valid = []
        for line in text.splitlines():
            # Beside what is no JSON: numbers of thousands of digits, and nesting without end.
            with contextlib.suppress(ValueError, RecursionError):
                values = json.loads(line)
                if isinstance(values, dict):
                    valid.append((line, values))
        return valid

    def _ends_its_line(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return True
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def hidden_name(folder: Path, suffix: str) -> Path:
    """`.NAME.suffix` beside a folder."""
    return folder.with_name(f".{folder.name}.{suffix}")


def publish_directory(partial: Path, final: Path, replace: bool = True) -> None:
    """Give a complete folder its final name, durably.

    The files must be synced by whoever wrote them. A folder of that name is set aside first: it is put back when the
    rename fails, and by `recover_directory` after a kill.

    Args:
        partial: on the same file system as `final`.
        replace: take the place of a folder that holds something; else only of an empty one.

    Raises:
        OSError: the disk refuses, or a folder is there that may not be replaced. What was there stays.
    """
    for folder, _, _ in os.walk(partial):
        sync_folder(folder)
    old = hidden_name(final, "replaced")
    shutil.rmtree(old, ignore_errors=True)
    if replace and final.exists():
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_directory(final: Path) -> None:
    """Put back a folder that `publish_directory` had set aside when the process was killed."""
    old = hidden_name(final, "replaced")
    if old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(folder: Path) -> None:
    """Delete a folder so that it is never seen half deleted: it is hidden first.

    Raises:
        OSError: it cannot be renamed.
    """
    to_delete = hidden_name(folder, "deleted")
    folder.rename(to_delete)
    shutil.rmtree(to_delete, ignore_errors=True)


@contextlib.contextmanager
def directory_lock(output: Path, option: str = "--out", waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold `.NAME.lock` beside a folder, so that one process at a time writes it.

    Args:
        option: named in the error.
        waiting: called when another process holds the lock, before waiting for it. None: do not wait.

    Raises:
        ConfigurationError: another process holds the lock, and `waiting` is None.
        OSError: the lock's file cannot be written.
    """
    import filelock

    path = hidden_name(output, "lock")
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if waiting is None:
            raise ConfigurationError(
                f"{option} {output}: another process writes it now: wait, or choose another folder"
            ) from None
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        if waiting is None:  # a process that waits may have opened the file already, and would lock it in vain
            path.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def atomic_directory(
    output: Path, option: str = "--out", may_replace: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A hidden folder beside `output` to write into, which takes its name when the block ends well.

    After an error nothing is left but what was there before. One process at a time.

    Args:
        output: folder to write; an empty one of that name is replaced.
        option: named in errors.
        may_replace: whether a folder of that name that holds something is replaced too. None: never.

    Raises:
        MegagammaError: another process writes the same folder, or the disk refuses.
    """
    require_writable(output.parent, option)
    partial = hidden_name(output, "partial")
    try:
        with directory_lock(output, option):
            try:
                recover_directory(output)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                publish_directory(partial, output, replace=may_replace is not None and may_replace(output))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise MegagammaError(f"{output}: cannot be written ({error.strerror or error}): {advice(error)}") from error
