"""Files written atomically: one under its final name is complete, or it is what it was. Folders: `megagamma.folders`."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from megagamma.errors import MegagammaError
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
        name = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
        # Made by `open`, unlike tempfile's, so that the umask decides who may read it.
        with open(name, mode.replace("w", "x"), encoding=encoding) as file:
            temporary = name
            yield file
            file.flush()
            os.fsync(file.fileno())
        keep_mode(path, temporary)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise MegagammaError(f"{path}: cannot be written ({error.strerror}): {advice(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def keep_mode(old: Path, new: Path) -> None:
    """Give what takes the place of a file or folder the rights of the old one, where there is one.

    Raises:
        OSError: the rights cannot be read or given.
    """
    try:
        before = stat.S_IMODE(os.stat(old).st_mode)
    except FileNotFoundError:
        return
    if before != stat.S_IMODE(os.stat(new).st_mode):
        os.chmod(new, before)


def first_free(folder: Path, before: str, after: str = "") -> Path:
    """The first of BEFORE1AFTER, BEFORE2AFTER, ... that is not there yet."""
    return next(
        path for number in itertools.count(1) if not os.path.lexists(path := folder / f"{before}{number}{after}")
    )


def free_name(path: Path, separator: str = "-") -> Path:
    """PATH where nothing is there, else the first of PATH-2, PATH-3, ... that is not there yet."""
    others = (path.with_name(f"{path.name}{separator}{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not os.path.lexists(name))


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
        with tempfile.TemporaryFile(dir=folder) as probe:  # without a name, so that a kill leaves nothing
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


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None where there is none. Of bytes that are no UTF-8 the character is lost, not the line."""
    try:
        values = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _step_of(line: bytes) -> float | None:
    """The step that a line is of, 0 where it names none; None where it cannot be read."""
    values = _object(line)
    step = values.get("step", 0) if values is not None else None
    return step if isinstance(step, int | float) and math.isfinite(step) else None


def _write_lines(path: Path, lines: list[bytes]) -> None:
    with atomic_file(path, "wb") as file:
        file.write(b"".join(line + b"\n" for line in lines))


class JsonLines:
    """A file of JSON objects, one a line, that survives a kill: each line is written whole and flushed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def read(self) -> list[dict[str, Any]]:
        """The objects of the file; empty when there is none. A reader may come while a run writes.

        A line that is no JSON object is left out: the last one may be half written, now or since a kill. A byte that is
        not UTF-8 spoils the character that it is in, and no other line.

        Raises:
            MegagammaError: the file is there and cannot be read.
        """
        return [values for line in self._lines() if (values := _object(line)) is not None]

    def keep_until(self, step: int) -> int:
        """Drop lines of later steps, so that a resumed run repeats nothing.

        Lines that cannot be read, as one that a kill cut off, move to `NAME.unreadable.jsonl` beside the file, as they are.

        Raises:
            MegagammaError: the file cannot be read or written.

        Returns:
            How many could not be read.
        """
        lines = self._lines()
        if not lines:
            return 0
        kept, unreadable = [], []
        for line in lines:
            number = _step_of(line)
            if number is None:
                unreadable.append(line)
            elif number <= step:
                kept.append(line)
        if unreadable:
            archive = self.unreadable_file
            before = archive.read_bytes() if archive.exists() else b""
            _write_lines(archive, [before.removesuffix(b"\n"), *unreadable] if before else unreadable)
        if len(kept) < len(lines) or not self._ends_its_line():
            _write_lines(self.path, kept)
        return len(unreadable)

    @property
    def unreadable_file(self) -> Path:
        """Where `keep_until` puts lines that cannot be read."""
        return self.path.with_name(f"{self.path.stem}.unreadable.jsonl")

    def archive(self) -> Path | None:
        """Give the file another name, `NAME.before-1.jsonl`, if it has a line of a step above 0; returns the new path.

        Raises:
            MegagammaError: the file cannot be read or renamed.
        """
        steps = [_step_of(line) for line in self._lines()]
        if not any(step is None or step > 0 for step in steps):
            return None
        self.close()
        new = first_free(self.path.parent, f"{self.path.stem}.before-", ".jsonl")
        try:
            self.path.rename(new)
            sync_folder(new.parent)
        except OSError as error:
            raise MegagammaError(f"{self.path}: cannot be renamed ({error.strerror}): {advice(error)}") from error
        return new

    def is_lost(self) -> bool:
        """Whether the file is open, and its name leads to another file or to none: what is written has no name."""
        if self._file is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return True
        except OSError:
            return False  # a file system that does not answer for a moment

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

    def _lines(self) -> list[bytes]:
        """The lines that are not empty, without their ends."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise MegagammaError(f"{self.path}: cannot be read ({error.strerror})") from error
        # Not splitlines(): a text may hold characters that it takes for ends of lines.
        return [line for line in content.split(b"\n") if line.strip()]

    def _ends_its_line(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return True
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
