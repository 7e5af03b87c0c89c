"""What a check found, and how many ranks' findings are shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megagamma.files import advice

Status = Literal["OK", "WARN", "FAIL"]
_ORDER = ("OK", "WARN", "FAIL")


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    check: str
    """What was looked at: versions, devices, threads, files, disk, space, data, ranks, clock, links, collective."""
    status: Status
    text: str
    fix: str = ""
    """What a user can do; empty where nothing is wrong."""
    rank: int = 0
    host: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    """The measured numbers, units in the names."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status."""
    return max((one.status for one in findings), key=_ORDER.index, default="OK")


def lines(findings: list[Finding]) -> list[str]:
    """Findings for people: what is well once per check, what is not with its hosts and its fix."""
    shown: dict[tuple[str, ...], list[Finding]] = {}
    for one in findings:
        key = (one.check, "OK") if one.status == "OK" else (one.check, one.status, one.text, one.fix)
        shown.setdefault(key, []).append(one)
    result = []
    for same in shown.values():
        first = max(same, key=_concern)
        where = f" ({len(same)} ranks; this is rank {first.rank})" if len(same) > 1 else ""
        if first.status != "OK":
            hosts = list(dict.fromkeys(one.host for one in same if one.host))
            ranks = _shortened([str(one.rank) for one in same])
            where = f" (rank {ranks} on {_shortened(hosts)})" if hosts else ""
        fix = f": {first.fix}" if first.fix else ""
        result.append(f"{first.status:<5} {first.check:<11} {first.text}{where}{fix}")
    return result


def _concern(one: Finding) -> float:
    """Orders findings that are all well: the clock furthest off, the slowest link."""
    if "offset_seconds" in one.values:
        return abs(float(one.values["offset_seconds"]))
    rates = one.values.get("bytes_per_second")
    return -min(rates.values(), default=0.0) if isinstance(rates, dict) else 0.0


def _shortened(words: list[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")


def within(seconds: float, check: str, what: str, action: Callable[[], list[Finding]]) -> list[Finding]:
    """What `action` finds; or that it gave no answer in time, as a file system that hangs does not.

    The thread that hangs is left behind, so that the process must end by `os._exit`.

    Args:
        seconds: deadline.
        what: is looked at, for the message.
    """
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(action())
        except OSError as error:
            found.append(Finding(check, "FAIL", f"{what}: {error.strerror or error}", advice(error)))
        except Exception as error:  # noqa: BLE001 - any failure of a check is what it found
            found.append(Finding(check, "FAIL", f"{what}: {error}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        fix = "look at the mount and at the file server; --deadline gives it more time"
        return [Finding(check, "FAIL", f"{what} gave no answer in {seconds:g} s", fix)]
    return found
