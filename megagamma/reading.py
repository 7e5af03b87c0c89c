"""Reading text that a user or a stranger wrote: bounded, strict, and never waiting. The only reader of JSON files.

A limit is far above what the project writes, so that it stops accidents and attacks only. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

MIB = 2**20
MAX_JSON_BYTES = 64 * MIB
MAX_DEPTH = 100
# More digits than any number that is meant: a float has 17 that count, and 308 are its largest.
MAX_NUMBER_LENGTH = 300


class Unreadable(ValueError):
    """Text that is not what it should be; the message is the reason alone, and the caller names file and remedy."""


def read_text(path: str | Path, limit: int = MAX_JSON_BYTES) -> str:
    """A file's text, UTF-8 with or without a byte order mark.

    Args:
        limit: largest size. Unit: bytes.

    Raises:
        OSError: it is missing or cannot be read.
        Unreadable: not a regular file (a FIFO or a device would be waited for), too large, or not UTF-8.
    """
    try:
        # Looked at before it is opened, since opening some devices does something; without waiting, as it can change.
        _require_regular(os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null byte in the name
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"no name of a file ({error})") from None
    with open(descriptor, "rb") as file:
        _require_regular(os.fstat(descriptor).st_mode)
        data = file.read(limit + 1)
        if len(data) > limit:
            size = max(os.fstat(descriptor).st_size, len(data))
            raise Unreadable(f"{size:,} bytes, where at most {limit:,} are read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"not UTF-8 (byte {data[error.start]:#04x} in line {line}): save it as UTF-8") from None


def _require_regular(mode: int) -> None:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    if not stat.S_ISREG(mode):
        raise Unreadable(f"a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file")


def parse_json(text: str, finite: bool = True) -> Any:
    """The JSON value of a text.

    Args:
        finite: refuse NaN, Infinity and numbers beyond the largest float, which Python's reader takes.

    Raises:
        Unreadable: not JSON, a repeated key (of which readers take one), or beyond a limit on depth and digits.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            _refuse_repeated(text, [key for key, _ in items])
        return found

    def constant(word: str) -> float:
        if finite:
            raise Unreadable(f"{word}: not a number of JSON: give a finite number, or null")
        return float(word)

    def decimal(digits: str) -> float:
        number = float(short(digits))
        if finite and number in (float("inf"), float("-inf")):
            raise Unreadable(f"{digits[:40]}: beyond the largest number: give a finite one, or null")
        return number

    def short(digits: str) -> str:
        if len(digits) > MAX_NUMBER_LENGTH:
            raise Unreadable(
                f"a number of {len(digits):,} digits ({digits[:20]}...): at most {MAX_NUMBER_LENGTH} are read"
            )
        return digits

    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_float=decimal,
            parse_int=lambda digits: int(short(digits)),
        )
        deep = depth_above(value, MAX_DEPTH)
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON: {error}") from None
    except RecursionError:
        deep = True
    if deep:
        raise Unreadable(f"nested deeper than {MAX_DEPTH} levels")
    return value


def read_json_value(path: str | Path, finite: bool = True, limit: int = MAX_JSON_BYTES) -> Any:
    """The JSON value in a file; see `read_text` and `parse_json`.

    Raises:
        OSError: it is missing or cannot be read.
        Unreadable: it is no regular file, too large, not UTF-8, or not JSON.
    """
    return parse_json(read_text(path, limit), finite)


def depth_above(value: Any, limit: int) -> bool:
    """Whether lists and mappings are nested deeper than `limit`. Without recursion."""
    level, depth = [value], 0
    while level:
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [item for one in inner for item in (one.values() if isinstance(one, dict) else one)]
        depth += bool(inner)
        if depth > limit:
            return True
    return False


def _refuse_repeated(text: str, keys: list[str]) -> NoReturn:
    key = next(key for key in keys if keys.count(key) > 1)
    quoted = json.dumps(key)
    found = [match.start() for match in re.finditer(re.escape(quoted) + r"\s*:", text)]
    # Where the key stands elsewhere too, which of its lines are meant is not known.
    lines = [text.count("\n", 0, start) + 1 for start in found] if len(found) == 2 else []
    where = f" (lines {lines[0]} and {lines[1]})" if len(lines) == 2 and lines[0] != lines[1] else ""
    raise Unreadable(f"{quoted[:200]} is given twice{where}: keep one of them")
