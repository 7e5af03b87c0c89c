"""The commit that this package's files are of. A copy of a checkout has it in a record, made when the copy was."""

from __future__ import annotations

import contextlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "snapshot.json"
"""In the root of a copy, see `megagamma.launching.snapshot`."""


@dataclass(frozen=True)
class Source:
    """A version of the source."""

    commit: str | None
    """None outside of a checkout."""
    is_changed: bool
    """Whether tracked files differ from the commit."""

    def __str__(self) -> str:
        """The commit, with a + where files differ from it; empty outside of a checkout."""
        return "" if self.commit is None else self.commit + ("+" if self.is_changed else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source_of(root: Path) -> Source:
    """Version of a checkout, or of a copy of one: a copy may lie inside another version's checkout.

    Args: root: the folder that holds megagamma/.
    """
    record = root / RECORD
    if record.is_file():
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Source(**json.loads(record.read_text(encoding="utf-8")))
        return Source(None, False)
    commit = _git(root, "rev-parse", "HEAD")
    return Source(commit, bool(commit and _git(root, "status", "--porcelain", "--untracked-files=no")))


def write_record(source: Source, root: Path) -> None:
    """Record the version of a copy in its root."""
    (root / RECORD).write_text(json.dumps(asdict(source)) + "\n", encoding="utf-8")
