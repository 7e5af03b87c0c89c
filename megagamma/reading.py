"""Bounded reading of files that others may have written: a text is checked before it is held in memory, JSON before it is
taken for what was written.

Every JSON file of the project is read here (YAML: `megagamma.config.yaml_files`), so that a file that is not what its
name says ends in one sentence: a pipe or a device, a file of gigabytes, another encoding, a key given twice, values nested
a thousand deep or numbers of thousands of digits.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 256 * 2**20
MAX_DEPTH = 100
MAX_DIGITS = 1000


class UnreadableError(ValueError):
    """Why a file cannot be read, as the end of a sentence that begins with its name."""


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file. Never waits, as opening a pipe would.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be opened or read.
        UnreadableError: it is no regular file, or larger than `max_bytes`.
    """
    # Not waiting for a writer: between a look at the name and the opening a pipe could take its place.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableError("is a folder, where a file is needed")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError("is no regular file, but a pipe, socket or device")
        if status.st_size > max_bytes:
            raise UnreadableError(f"has {status.st_size:,} bytes, more than the limit of {max_bytes:,}")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:  # it grew, or is a file whose size the system does not know
        raise UnreadableError(f"has more than the limit of {max_bytes:,} bytes")
    return content


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a regular file, UTF-8; a byte order mark at its beginning is left out.

    Raises:
        OSError, UnreadableError: see `read_bytes`; UnreadableError also when it is not UTF-8.
    """
    return decode(read_bytes(path, max_bytes))


def decode(content: bytes) -> str:
    """Bytes as UTF-8, without a byte order mark.

    Raises:
        UnreadableError: they are not UTF-8, naming the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableError(f"is not UTF-8 (byte 0x{content[error.start]:02x} in line {line})") from error


def parse_json(text: str, finite: bool = False) -> Any:
    """A JSON value.

    Args:
        text: of the whole file, or of a line of JSON lines.
        finite: refuse NaN and infinite numbers, which are not JSON, though Python writes them.

    Raises:
        UnreadableError: not JSON, a key given twice in one object, nested deeper than `MAX_DEPTH`, or a whole number of
            more than `MAX_DIGITS` digits.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole_number,
            parse_float=_finite_number if finite else None,
            parse_constant=_refuse_constant if finite else None,
        ) if _depth(text) <= MAX_DEPTH else _too_deep()
    except json.JSONDecodeError as error:
        raise UnreadableError(f"is not JSON ({error})") from error
    except RecursionError:
        _too_deep()


def _too_deep() -> Any:
    raise UnreadableError(f"nests values deeper than {MAX_DEPTH} levels")


def _depth(text: str) -> int:
    """How deep brackets are nested at most, or more: those inside strings count too where there are very many."""
    # A text of few brackets cannot be deep; only others are worth a look at each character.
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    inside = escaped = False
    for character in text:
        if inside:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                inside = False
        elif character == '"':
            inside = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest
