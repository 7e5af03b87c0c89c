"""Files written atomically: one under its final name is complete, or it is what it was. Folders: `megagamma.folders`."""

from __future__ import annotations

import contextlib
import errno
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
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
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
            kept = [line for line, values in self._valid_lines() if values.get("step", 0) <= step]
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
            with contextlib.suppress(json.JSONDecodeError):
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
