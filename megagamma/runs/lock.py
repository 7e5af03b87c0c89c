"""The lock of a run's folder: two processes must not train in one folder.

The file `.lock` names its holder: host, boot id, process with its start time, SLURM job, and when it last renewed it.
Rank 0 of training holds it; readers of the folder neither take nor check it.

How two takers of one stale lock are kept apart. Every version of the lock has a token of its own. Whoever wants to
change the lock (a taker, or the holder that renews or releases it) first creates the file `.lock.TOKEN`, the claim on
the version that it read. Creation fails when the file is there, so that a version is followed by one change only. A
claim says who made it: when that process dies in between, the claim is judged like a lock, and can be claimed in turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megagamma.environment import slurm_job_id
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import advice, write_json
from megagamma.runs.folder import RunFolder

RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0
# A claim, a claim or lock before it has its name, and the file that an atomic write of the lock begins with.
_OWN_NAME = re.compile(r"\.lock\.[0-9a-f]{32}(\.new)?|\.\.lock\.[0-9a-z_]{8,12}")


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _start_time(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; None when it has ended or cannot be seen.

    With the boot id it tells a process from a later one of the same number. Source: field 22 of proc(5)'s stat.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@dataclass(frozen=True)
class LockHolder:
    """One version of the lock: who holds it, since when, and the last sign of life."""

    host: str
    boot_id: str
    process_namespace: str
    """Containers of one host may share its name, and number their processes each for itself."""
    pid: int
    start_time: int
    slurm_job: str | None
    since: float
    """Unix time. Unit: s."""
    heartbeat: float
    """Unix time at which the holder renewed the lock last. Unit: s."""
    token: str

    @classmethod
    def this_process(cls) -> LockHolder:
        """A new lock of this process."""
        namespace = ""
        with contextlib.suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        now = time.time()
        return cls(
            host=socket.gethostname(),
            boot_id=_first_line("/proc/sys/kernel/random/boot_id"),
            process_namespace=namespace,
            pid=os.getpid(),
            start_time=_start_time(os.getpid()) or 0,
            slurm_job=slurm_job_id(),
            since=now,
            heartbeat=now,
            token=uuid.uuid4().hex,
        )

    def renewed(self) -> LockHolder:
        """The version that follows, of the same holder."""
        return dataclasses.replace(self, heartbeat=time.time(), token=uuid.uuid4().hex)

    def is_stale(self, seconds: float = STALE_SECONDS) -> bool:
        """Whether nobody trains under this lock any more.

        So it is when the process has ended here; when this host has been started again; when it is of this SLURM job,
        which was requeued; or when it was not renewed for `seconds`, as of a host that is gone. The last compares clocks
        of hosts, which must agree to a minute.
        """
        here = LockHolder.this_process()
        if time.time() - self.heartbeat > seconds:
            return True
        if self.host == here.host:
            if self.boot_id != here.boot_id:
                return True
            if self.process_namespace == here.process_namespace:
                # A process that lives here is no requeue, even under this job's number.
                return not self._lives()
        return self.slurm_job is not None and self.slurm_job == here.slurm_job

    def _lives(self) -> bool:
        if not _exists(self.pid):
            return False
        started = _start_time(self.pid)
        if started is None:
            # Ended but not waited for, or of a user whose processes are hidden from this one.
            return not Path(f"/proc/{self.pid}").exists()
        return started == self.start_time

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}, since {since}"


def read_lock(folder: str | Path) -> LockHolder | None:
    """Who holds the lock of a run's folder, stale or not; None when nobody does.

    Raises:
        MegagammaError: the lock is there and cannot be read.
    """
    return _read(RunFolder(folder).lock_file)


def _read(path: Path) -> LockHolder | None:
    try:
        text, changed = path.read_text(encoding="utf-8", errors="replace"), path.stat().st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MegagammaError(f"{path}: cannot be read ({error.strerror}): {advice(error)}") from error
    try:
        return LockHolder(**json.loads(text))
    except (ValueError, RecursionError, TypeError):
        # Being written where there are no hard links, or changed by hand: held until it is old.
        token = hashlib.sha256(text.encode()).hexdigest()[:32]
        return LockHolder("an unknown host", "", "", 0, 0, None, changed, changed, token)


def _create(path: Path, holder: LockHolder) -> bool:
    """Write a file unless there is one of that name; returns whether it was written. Atomic, over NFS too."""
    text = json.dumps(dataclasses.asdict(holder), indent=2) + "\n"
    temporary = path.with_name(f".lock.{holder.token}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        return _link(temporary, path, text)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path, text: str) -> bool:
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        # Over NFS a request that is repeated meets its own first success.
        return temporary.stat().st_nlink == 2
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
            return True
        except FileExistsError:
            return False


class RunLock:
    """Holds the lock of a run's folder, and renews it in a thread of its own.

        with RunLock(config.run.folder):
            ...

    A second lock on the same folder in one process is refused too.
    """

    def __init__(
        self,
        folder: str | Path,
        what: str = "run.folder",
        on_lost: Callable[[str], None] | None = None,
        renew_seconds: float = RENEW_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        """
        Args:
            folder: of the run; created when it is not there.
            what: the option that names it, for messages.
            on_lost: called from the lock's thread, with a sentence that says who took the lock, when this process lost it.
            renew_seconds: between two signs of life.
            stale_seconds: without a sign of life after which others may take the lock.
        """
        self.path = RunFolder(folder).lock_file
        self.what, self.on_lost = what, on_lost
        self.renew_seconds, self.stale_seconds = renew_seconds, stale_seconds
        self.lost = ""
        """Who took the lock from this process, such as after it was suspended for minutes; empty while it holds it."""
        self._own: LockHolder | None = None
        self._replaced: set[str] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, or take over one that is stale.

        Raises:
            ConfigurationError: another process trains in this folder.
            MegagammaError: the lock cannot be read or written.
        """
        own = LockHolder.this_process()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not _create(self.path, own) and not self._take_over(own):
                time.sleep(0.005)  # it changed while this process looked at it: look again
            self._sweep()
        except OSError as error:
            raise MegagammaError(
                f"{self.what}={self.path.parent}: its lock cannot be written ({error.strerror}): {advice(error)}"
            ) from error
        self._own, self.lost = own, ""
        self._stop.clear()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing and remove the lock, if it is still this process's own. Without a lock it does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        own, self._own = self._own, None
        if own is None or self.lost or own.pid != os.getpid():  # a fork has the object, not the lock
            return
        with contextlib.suppress(OSError, MegagammaError):  # it becomes stale with the process
            closing = own.renewed()
            if self._claim([own], closing):
                self.path.unlink(missing_ok=True)
                self._claim_file(own).unlink(missing_ok=True)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    # -- one change of the lock ----------------------------------------------------------------------------------

    def _claim_file(self, holder: LockHolder) -> Path:
        return self.path.with_name(f".lock.{holder.token}")

    def _chain(self) -> list[LockHolder]:
        """The lock, the claim on it, the claim on that claim, ...; the last is who may act."""
        chain = []
        holder = _read(self.path)
        while holder is not None:
            chain.append(holder)
            holder = _read(self._claim_file(holder))
        return chain

    def _claim(self, chain: list[LockHolder], new: LockHolder) -> bool:
        """Get the sole right to change the lock that begins the chain, unless it was changed or claimed meanwhile."""
        claim = self._claim_file(chain[-1])
        if not _create(claim, new):
            return False
        lock = _read(self.path)
        if lock is None or lock.token not in {chain[0].token, *self._replaced}:
            claim.unlink(missing_ok=True)
            return False
        return True

    def _replace(self, chain: list[LockHolder], new: LockHolder) -> bool:
        """Put `new` in place of the lock that begins the chain; returns whether this process was the one to do it."""
        if not self._claim(chain, new):
            return False
        try:
            write_json(self.path, dataclasses.asdict(new))
        except MegagammaError:
            # Nothing was changed: a claim that stayed would say otherwise.
            self._claim_file(chain[-1]).unlink(missing_ok=True)
            raise
        # From here on these claims bar nobody: who finds one free sees that the lock is another, and lets go.
        for holder in reversed(chain):
            self._claim_file(holder).unlink(missing_ok=True)
        return True

    def _take_over(self, own: LockHolder) -> bool:
        """Replace a stale lock; False when it changed while this process looked at it.

        Raises:
            ConfigurationError: the lock is not stale.
        """
        chain = self._chain()
        if not chain:
            return False
        if not chain[-1].is_stale(self.stale_seconds):
            raise ConfigurationError(self._refusal(chain[-1]))
        if not self._replace(chain, own):
            return False
        self._replaced = {holder.token for holder in chain}
        return True

    def _refusal(self, holder: LockHolder) -> str:
        age = max(0.0, time.time() - holder.heartbeat)
        return (
            f"{self.what}={self.path.parent}: in use by {holder} (last sign of life {age:.0f} s ago): wait until it ends or "
            f"end it, or choose another folder; a lock of a process that is gone is void after {self.stale_seconds:g} s"
        )

    def _sweep(self) -> None:
        """Remove claims and temporary files that killed processes left behind long ago."""
        for file in (*self.path.parent.glob(".lock.*"), *self.path.parent.glob("..lock.*")):
            with contextlib.suppress(OSError):
                is_old = time.time() - file.stat().st_mtime > 10 * self.stale_seconds
                if is_old and _OWN_NAME.fullmatch(file.name):
                    file.unlink()

    # -- the signs of life ---------------------------------------------------------------------------------------

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self.renew_seconds):
            # A disk that is full for a moment: the next attempt comes before the lock is stale.
            with contextlib.suppress(OSError, MegagammaError):
                if not self._renew():
                    if self.on_lost is not None:
                        self.on_lost(self.lost)
                    return

    def _renew(self) -> bool:
        """Write a new sign of life; returns whether the lock is still this process's own."""
        assert self._own is not None
        chain = self._chain()
        if chain and chain[0].token in self._replaced:
            # The holder before woke up in the middle of a change, and wrote its lock over ours.
            chain = [self._own]
        if not chain:
            # Removed by hand: nobody holds it.
            new = self._own.renewed()
            if _create(self.path, new):
                self._own = new
                return True
            chain = self._chain()
        if chain and chain[-1].token == self._own.token:
            new = self._own.renewed()
            if self._replace(chain, new):
                self._own = new
                return True
            chain = self._chain()
        taker = str(chain[-1]) if chain else "another process, which has ended"
        self.lost = f"{self.what}={self.path.parent}: its lock was taken over by {taker}"
        return False
