"""Writes that matter: a file under its final name is complete, or it is not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megagamma.errors import MegagammaError


def sync_folder(folder: str | Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically: to a temporary name beside it, synced, then renamed.

    Raises:
        MegagammaError: the folder cannot be written or the disk is full; what was there stays.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise MegagammaError(f"{path}: cannot be written ({error.strerror}): {advice(error)}") from error


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy a file atomically: to a temporary name beside its place, synced, then renamed.

    Raises:
        MegagammaError: it cannot be written; what was there stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as read, open(temporary, "wb") as file:
            shutil.copyfileobj(read, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MegagammaError(f"{path}: cannot be written ({error.strerror}): {advice(error)}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        MegagammaError: it is missing, cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MegagammaError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise MegagammaError(f"{path}: cannot be read: must be a JSON object, not {type(found).__name__}")
    return found


def advice(error: OSError) -> str:
    """What a user can do about a file that cannot be written."""
    import errno

    known = {
        errno.ENOSPC: "free some space on the disk or choose another folder",
        errno.EDQUOT: "the quota is used up: free some space or choose another folder",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "give yourself the right to write there or choose another folder",
        errno.ENOTDIR: "a file stands where a folder is needed: choose another folder",
        errno.EEXIST: "a file stands where a folder is needed: choose another folder",
    }
    return known.get(error.errno or 0, "choose another folder")


def require_writable(folder: str | Path, knob: str) -> Path:
    """Create a folder and prove that a file can be written in it.

    Raises:
        MegagammaError: naming the knob, the folder and the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable.") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise MegagammaError(f"{knob}={folder}: cannot be written ({error.strerror}): {advice(error)}") from error
    return folder
