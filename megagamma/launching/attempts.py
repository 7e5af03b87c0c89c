"""The attempts of a run: one line when one starts, when a signal or a hang is noticed, and when it ends.

They lie in RUN/attempts.jsonl. A chain is the attempts of one SLURM job, over all its requeues, or of one supervisor without
SLURM: failures are counted within a chain, so that whoever submits a run anew begins with a clean count.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megagamma.errors import MegagammaError
from megagamma.runs.folder import RunFolder

Kind = Literal["done", "preempted", "stopped", "diverged", "refused", "failed", "hung", "lost"]
FAILURES: tuple[Kind, ...] = ("failed", "hung", "lost")

# What a rank says that gave up since another one is gone (`megagamma.distributed.peers`): its exit code is 2, and yet
# nothing of the run's has to be fixed.
_LOST_PEER = "another rank ended, or gave no answer"
_TAIL = 16384  # bytes of a rank's log


@dataclass(frozen=True)
class Attempt:
    """One attempt, as its lines tell."""

    number: int
    chain: str
    command: str
    """Fingerprint of the command, see `fingerprint`."""
    kind: Kind
    code: int | None
    """None when nobody was there to see it end."""
    before: int | None
    """Step of the newest checkpoint at its start; None without one."""
    after: int | None

    @property
    def has_progress(self) -> bool:
        """Whether it left a newer checkpoint than it found."""
        return self.after is not None and (self.before is None or self.after > self.before)


def fingerprint(command: Sequence[str]) -> str:
    """A hash of what is trained: the words from the program on, and the content of the files that they name.

    What comes before, such as the launcher's options, nodes and ports, may change between two starts of the same run.
    """
    programs = [i for i, word in enumerate(command) if Path(word).name in ("pretrain.py", "pretrain")]
    words = list(command[programs[0] + 1 :]) if programs else list(command)
    digest = hashlib.sha256()
    for word in words:
        path, content = Path(word.rpartition("=")[2]), word.encode()
        if path.suffix in (".yaml", ".yml", ".json"):
            with contextlib.suppress(OSError):
                content = path.read_bytes()  # wherever a copy of it lies
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]


def errors_in(log: Path, most: int, start: int = 0) -> list[str]:
    """Lines of a log that begin with `error: `; none where it cannot be read.

    Args:
        most: bytes that are read, from the end.
        start: bytes that belong to an earlier attempt.
    """
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(start, log.stat().st_size - most))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
        return [line for line in lines if line.startswith("error: ")]
    return []


def blames_a_peer(lines: Sequence[str]) -> bool:
    """Whether there are errors, of `errors_in`, and each says that another rank went away."""
    return bool(lines) and all(_LOST_PEER in line for line in lines)


def is_lost_peer(logs: Path) -> bool:
    """Whether all that the ranks of an attempt complain of is that another one went away, as when a network was cut."""
    return blames_a_peer([line for log in sorted(logs.glob("*.log")) for line in errors_in(log, _TAIL)])


def kind_of(code: int, stop: str | None, logs: Path) -> Kind:
    """What an exit code means.

    Args:
        code: of the launcher or the process, negative for a signal; see `megagamma.cli` for those of training.
        stop: "preempted" or "stopped" when the attempt was asked to stop before it ended.
        logs: folder of the ranks' logs.
    """
    if code == 0:
        return "done"
    if code == 3:
        return "diverged"
    if code == 2 and not is_lost_peer(logs):
        return "refused"
    # Asked to stop, it may have been killed before it listened, or by SLURM before it had saved.
    if stop == "preempted":
        return "preempted"
    if stop == "stopped" or code == 75:
        return "stopped"
    return "failed"


class AttemptLog:
    """Reads and writes the attempts of a run."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._lines = folder.attempts()

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint; None without one."""
        steps = self.folder.steps()
        return steps[-1] if steps else None

    def write(self, event: str, attempt: int, **values: Any) -> None:
        """Add a line. A disk that is full must not end the process that looks after the run."""
        try:
            self._lines.write({"event": event, "attempt": attempt, "time": time.time(), **values})
        except MegagammaError as error:
            print(f"supervise: {error}", file=sys.stderr, flush=True)
            self._lines.close()

    def read(self) -> list[Attempt]:
        """All attempts, by number. One without an end is lost, as with its node; after a signal it was stopped.

        The checkpoint that a lost one left is the newest one that the next attempt found, or the newest now.
        """
        lines = self._lines.read()
        starts = [line for line in lines if line.get("event") == "start"]
        found = []
        for place, start in enumerate(starts):
            own = [line for line in lines if line.get("attempt") == start.get("attempt") and line is not start]
            end = next((line for line in own if line["event"] == "end"), None)
            signals = [line for line in own if line["event"] == "signal"]
            if end is not None:
                kind, code, after = end.get("kind", "failed"), end.get("code"), end.get("checkpoint")
            else:
                kind = signals[-1].get("kind", "stopped") if signals else "lost"
                code = None
                after = starts[place + 1].get("checkpoint") if place + 1 < len(starts) else self.newest_step()
            found.append(
                Attempt(
                    int(start["attempt"]),
                    str(start.get("chain")),
                    str(start.get("fingerprint")),
                    kind,
                    code,
                    start.get("checkpoint"),
                    after,
                )
            )
        return found

    def ends(self) -> int:
        """How often the run was trained to its end, as events.jsonl says."""
        return sum(event.get("event") == "end" for event in self.folder.events().read())

    def has_ended(self, command: str) -> bool:
        """Whether the run has been trained to its end by this very command, so that a requeue has nothing to do.

        Args: command: fingerprint.
        """
        attempts = self.read()
        if not attempts or attempts[-1].command != command:
            return False
        kinds = [event.get("event") for event in self.folder.events().read()]
        last = next((kind for kind in reversed(kinds) if kind in ("start", "resume", "end")), None)
        return last == "end"


def failures(attempts: Sequence[Attempt]) -> tuple[int, int]:
    """Failures of a chain: in all, and in a row without a newer checkpoint.

    Args: attempts: of one chain, by number.
    """
    total = in_a_row = 0
    for attempt in attempts:
        failed = attempt.kind in FAILURES
        total += failed
        in_a_row = 0 if attempt.has_progress else in_a_row + failed
    return total, in_a_row
