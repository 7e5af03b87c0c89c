"""A fault drill: real training runs on a disk of yours, each hit by one fault, and whether what is promised holds.

`megagamma.testing.faults` has the faults; `megagamma fault_drill` runs them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megagamma.runs.folder import RunFolder
from megagamma.testing.forked import launch

# A model of 0.1 million weights, in fp32 on a CPU: the same numbers on every machine's disk.
SMALL = (
    *("--data.corpus", "tiny", "--run.device", "cpu", "--run.threads", "1", "--run.start_minutes", "2"),
    *("--model.hidden_size", "64", "--model.num_layers", "2", "--model.num_attention_heads", "4"),
    *("--data.sequence_length", "32", "--data.global_batch_size", "4", "--data.micro_batch_size", "2"),
    # A learning rate that does not depend on the number of steps: what stopped early equals what did not.
    *("--optimizer.lr", "0.003", "--schedule.shape", "constant", "--schedule.warmup_steps", "2"),
    *("--validation.interval", "0", "--validation.at_end", "false"),
    *("--logging.sample_tokens", "0", "--logging.wandb", "disabled", "--checkpoint.interval", "2"),
)
# 5 million weights: a save of 60 MB, long enough to be hit.
LARGE = (
    *SMALL,
    *("--model.hidden_size", "384", "--model.ffn_hidden_size", "1536", "--data.sequence_length", "16"),
    *("--optimizer.lr", "0.0003", "--checkpoint.interval", "1", "--checkpoint.keep_last", "2"),
)
_SECONDS = 180


class Broken(Exception):
    """What was promised does not hold; the message says what was seen."""


def require(holds: bool, seen: str) -> None:
    """Raise `Broken` unless a promise holds.

    Args: seen: what was seen instead.
    """
    if not holds:
        raise Broken(seen)


class Skipped(Exception):
    """The fault cannot be made on this machine; the message says why."""


@dataclass(frozen=True)
class Fault:
    """One row of the drill."""

    name: str
    promise: str
    make: Callable[[Drill], str]
    """Makes the fault and checks the promise; returns what was seen. Raises `Broken` or `Skipped`."""


@dataclass(frozen=True)
class Outcome:
    """What a fault led to."""

    fault: str
    promise: str
    status: str
    """"holds", "BROKEN" or "skipped"."""
    seen: str
    seconds: float


@dataclass
class Run:
    """A training run in processes of its own."""

    folder: RunFolder
    log: Path
    ranks: list[BaseProcess]

    @property
    def said(self) -> str:
        """Everything that its ranks printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def steps(self) -> int:
        """Steps that it has recorded."""
        lines = self.folder.metrics().read()
        return int(lines[-1]["step"]) if lines else 0

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Poll quickly.

        Raises:
            Broken: a rank ended before the condition held, or the time is over.
        """
        end = time.monotonic() + _SECONDS
        while not condition():
            if not all(rank.is_alive() for rank in self.ranks):
                raise Broken(f"a rank ended before {what}: {last_line(self.said)}")
            if time.monotonic() > end:
                raise Broken(f"{what} did not come in {_SECONDS} s: {last_line(self.said)}")
            time.sleep(0.0005)

    def send(self, number: int, rank: int = 0) -> None:
        """Send a signal to one rank."""
        os.kill(self.ranks[rank].pid or 0, number)

    def end(self) -> list[int]:
        """Wait for all ranks; returns their exit codes, negative for a signal.

        Raises:
            Broken: one does not end.
        """
        deadline = time.monotonic() + _SECONDS
        for rank in self.ranks:
            rank.join(max(0.1, deadline - time.monotonic()))
        if any(rank.is_alive() for rank in self.ranks):
            raise Broken(f"it hangs: {last_line(self.said)}")
        return [rank.exitcode if rank.exitcode is not None else 1 for rank in self.ranks]

    def kill(self) -> None:
        """End what is still there."""
        for rank in self.ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()


class Drill:
    """The folder of one fault, and how runs are made in it."""

    def __init__(self, place: Path, seed: int = 1) -> None:
        """Args: place: an empty folder; seed: of the places and times of faults."""
        self.place, self.random = place, random.Random(seed)
        self._runs: list[Run] = []

    def start(
        self,
        *more: str,
        name: str = "run",
        model: Sequence[str] = SMALL,
        steps: int = 8,
        ranks: int = 1,
        prepare: Callable[[int], None] | None = None,
    ) -> Run:
        """Start training in the folder `name`; see `megagamma.testing.forked.launch`."""
        folder = self.place / name
        log = self.place / f"{name}-{len(self._runs)}.log"
        cache = ("--data.cache", str(self.place.parent / "data"))
        arguments = [*model, *cache, "--run.folder", str(folder), "--run.steps", str(steps), *more]
        run = Run(RunFolder(folder), log, launch(ranks, arguments, log, self.place, prepare))
        self._runs.append(run)
        return run

    def train(self, *more: str, expect: int = 0, **options: Any) -> Run:
        """Train to the end.

        Args:
            expect: exit code that every rank must have.

        Raises:
            Broken: another exit code, a traceback, or it hangs.
        """
        run = self.start(*more, **options)
        codes = run.end()
        if set(codes) != {expect}:
            raise Broken(f"exit codes {codes} in place of {expect}: {last_line(run.said)}")
        if "Traceback" in run.said:
            raise Broken(f"a traceback: {last_line(run.said)}")
        return run

    def losses(self, run: Run) -> list[float]:
        """Losses of steps 1, 2, ...

        Raises:
            Broken: a step is missing or there twice.
        """
        lines = run.folder.metrics().read()
        steps = [line["step"] for line in lines]
        if steps != list(range(1, len(steps) + 1)):
            raise Broken(f"metrics.jsonl holds the steps {steps}")
        return [line["loss"] for line in lines]

    def resumes_like(self, whole: Run, run: Run, *more: str, exact: bool = True, **options: Any) -> str:
        """Resume `run` to its end and compare its losses with those of the uninterrupted run `whole`.

        Args:
            exact: to the bit; else, after another layout, to 1e-5.

        Raises:
            Broken: they differ.
        """
        again = self.train(*more, name=run.folder.path.name, **options)
        expected, found = self.losses(whole), self.losses(again)
        worst = max((abs(a / b - 1) for a, b in zip(found, expected, strict=False)), default=0.0)
        if len(found) != len(expected) or worst > (0.0 if exact else 1e-5):
            raise Broken(f"{len(found)} of {len(expected)} steps, losses differ by {worst:.1e}")
        return f"resumed: {len(found)} losses equal" + (" to the bit" if exact else f" to {max(worst, 1e-12):.0e}")

    def close(self) -> None:
        """End every process that is left."""
        for run in self._runs:
            run.kill()


def last_line(text: str) -> str:
    """The last line that says something, for a table's cell."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:240] if lines else "(nothing was printed)"


@contextlib.contextmanager
def _place(storage: Path, name: str) -> Iterator[Path]:
    place = storage / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def run_fault(fault: Fault, storage: Path, seed: int = 1) -> Outcome:
    """Make one fault in a folder below `storage`, which is deleted afterwards.

    Args:
        storage: folder of the drill; data that all faults share is prepared in its folder `data`.
        seed: of the places and times of faults.
    """
    began = time.monotonic()
    with _place(storage, fault.name.replace(" ", "_")) as place:
        drill = Drill(place, seed)
        try:
            status, seen = "holds", fault.make(drill)
        except Broken as problem:
            status, seen = "BROKEN", str(problem)
        except Skipped as reason:
            status, seen = "skipped", str(reason)
        except Exception as error:  # noqa: BLE001 - a row of the table, and the next fault
            status, seen = "BROKEN", f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            drill.close()
    return Outcome(fault.name, fault.promise, status, " ".join(seen.split()), time.monotonic() - began)


def as_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as plain values."""
    return [asdict(outcome) for outcome in outcomes]


SIGNALS = {one.name: one for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)}
