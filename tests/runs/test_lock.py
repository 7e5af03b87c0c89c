"""A run's folder has one trainer: real processes hold, lose, and take over its lock."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import write_json
from megagamma.runs import lock as lock_module
from megagamma.runs.lock import LockHolder, RunLock, read_lock

# Takes the lock argv[1], with a sign of life every argv[2] s; says so, and waits for a line.
HOLDER = textwrap.dedent("""
    import sys
    from megagamma.runs.lock import RunLock
    lock = RunLock(sys.argv[1], renew_seconds=float(sys.argv[2]), on_lost=lambda text: print("lost", text, flush=True))
    lock.acquire()
    print("holds", flush=True)
    sys.stdin.readline()
    lock.release()
    print("released", flush=True)
""")

# Fifty times: waits for the file argv[1]/startN, then takes the lock argv[1]/runN as HOLDER does, or says why not.
RACER = textwrap.dedent("""
    import os, sys
    from megagamma.errors import ConfigurationError
    from megagamma.runs.lock import RunLock
    for attempt in range(50):
        lock = RunLock(f"{sys.argv[1]}/run{attempt}")
        while not os.path.exists(f"{sys.argv[1]}/start{attempt}"):
            pass
        try:
            lock.acquire()
        except ConfigurationError as error:
            print("refused", error, flush=True)
            continue
        print("holds", flush=True)
        sys.stdin.readline()
        lock.release()
        print("released", flush=True)
""")


class Holder:
    """Another process that takes a lock."""

    def __init__(self, folder: Path, renew: float = 20, script: str = HOLDER, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(renew)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, **variables},
        )  # fmt: skip

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def release(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    """Start processes that are ended with the test."""
    started: list[Holder] = []

    def start(*arguments: object, **options: object) -> Holder:
        started.append(Holder(tmp_path, *arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for holder in started:
        holder.end()


def lock_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewrite(folder: Path, **changes: object) -> None:
    """Change the lock of a folder, as if another process had written it."""
    path = folder / ".lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def here(**changes: object) -> LockHolder:
    return dataclasses.replace(LockHolder.this_process(), **changes)  # type: ignore[arg-type]


# -- one process ---------------------------------------------------------------------------------------------------


def test_lock_says_who_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    begin = time.time()
    folder = tmp_path / "new" / "run"
    assert read_lock(folder) is None
    with RunLock(folder) as lock:
        holder = read_lock(folder)
        assert holder is not None
        assert (holder.pid, holder.slurm_job) == (os.getpid(), "77")
        assert begin <= holder.since == holder.heartbeat <= time.time()
        assert len(holder.boot_id) > 8 and holder.start_time > 0
        assert lock_files(folder) == [".lock"]
        assert set(json.loads((folder / ".lock").read_text())) == {
            "host", "boot_id", "process_namespace", "pid", "start_time", "slurm_job", "since", "heartbeat", "token",
        }  # fmt: skip
    assert not lock.lost
    assert lock_files(folder) == [], "nothing is left"
    assert read_lock(folder) is None


def test_lock_is_released_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    with RunLock(tmp_path):
        assert lock_files(tmp_path) == [".lock"]


def test_release_without_a_lock_does_nothing(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.release()
    with RunLock(tmp_path):
        lock.release()
        assert lock_files(tmp_path) == [".lock"], "that of the other object stays"


def test_one_object_locks_again_and_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, renew_seconds=0.01)
    for _ in range(3):
        with lock:
            token = json.loads((tmp_path / ".lock").read_text())["token"]
            until(lambda token=token: json.loads((tmp_path / ".lock").read_text())["token"] != token)
    assert lock_files(tmp_path) == []


def test_second_lock_in_one_process_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ConfigurationError, match=rf"in use by process {os.getpid()} on "):
        RunLock(tmp_path).acquire()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MegagammaError, match=r"run\.folder=.*file: its lock cannot be written .*a file stands where"):
        RunLock(tmp_path / "file").acquire()


def test_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path):
        with pytest.raises(ConfigurationError, match="in use by process"):
            RunLock(tmp_path).acquire()
        rewrite(tmp_path, heartbeat=time.time() - 121)
        with RunLock(tmp_path):
            assert lock_files(tmp_path) == [".lock"]


# -- two processes ---------------------------------------------------------------------------------------------------


def test_second_launch_is_refused(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    holder = hold(SLURM_JOB_ID="123")
    assert holder.line() == "holds"
    before = (tmp_path / ".lock").read_bytes()
    with pytest.raises(ConfigurationError) as caught:
        RunLock(tmp_path).acquire()
    assert re.fullmatch(
        rf"run\.folder={re.escape(str(tmp_path))}: in use by process {holder.process.pid} on {os.uname().nodename}, "
        r"SLURM job 123, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(last sign of life \d+ s ago\): wait until it ends or end "
        r"it, or choose another folder; .*",
        str(caught.value),
    )
    assert (tmp_path / ".lock").read_bytes() == before
    assert lock_files(tmp_path) == [".lock"]
    assert holder.release() == "released"
    RunLock(tmp_path).acquire()


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    holder = hold()
    assert holder.line() == "holds"
    holder.process.send_signal(signal.SIGKILL)
    # Not waited for: a process that has ended counts as dead though its parent has not asked yet.
    until(lambda: Path(f"/proc/{holder.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    with RunLock(tmp_path):
        taken = read_lock(tmp_path)
        assert taken is not None and taken.pid == os.getpid()
        assert lock_files(tmp_path) == [".lock"]
    holder.process.wait()


def test_lock_of_a_suspended_process_holds_while_it_is_fresh(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    holder = hold(0.05)
    assert holder.line() == "holds"
    holder.process.send_signal(signal.SIGSTOP)
    until(lambda: Path(f"/proc/{holder.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    with pytest.raises(ConfigurationError, match=f"in use by process {holder.process.pid}"):
        RunLock(tmp_path).acquire()
    # Suspended for longer than a lock lives, it loses it, and hears of that when it is woken.
    time.sleep(0.3)
    with RunLock(tmp_path, stale_seconds=0.2):
        holder.process.send_signal(signal.SIGCONT)
        assert holder.line().startswith(
            f"lost run.folder={tmp_path}: its lock was taken over by process {os.getpid()} on"
        )
        assert holder.release() == "released"
        taken = read_lock(tmp_path)
        assert taken is not None and taken.pid == os.getpid(), "it released what was its own only"
        assert lock_files(tmp_path) == [".lock"]


def test_signs_of_life_keep_the_lock(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    holder = hold(0.02)
    assert holder.line() == "holds"
    first = read_lock(tmp_path)
    time.sleep(1.0)
    later = read_lock(tmp_path)
    assert first is not None and later is not None
    assert later.heartbeat > first.heartbeat and later.since == first.since
    with pytest.raises(ConfigurationError, match="in use"):
        RunLock(tmp_path, stale_seconds=0.8).acquire()
    assert holder.release() == "released"
    assert lock_files(tmp_path) == []


def test_of_two_takers_exactly_one_wins(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    """Fifty times two processes race: for a free lock, and for one whose holder is dead."""
    dead = here(pid=2**22 + 1)
    takers = [hold(script=RACER) for _ in range(2)]
    for attempt in range(50):
        folder = tmp_path / f"run{attempt}"
        folder.mkdir()
        if attempt % 2:
            (folder / ".lock").write_text(json.dumps(dataclasses.asdict(dead)))
        (tmp_path / f"start{attempt}").touch()
        answers = [taker.line() for taker in takers]
        assert sorted(answer.split()[0] for answer in answers) == ["holds", "refused"], answers
        first = answers[0] == "holds"
        winner, refusal = (takers[0], answers[1]) if first else (takers[1], answers[0])
        assert f"in use by process {winner.process.pid} on" in refusal
        assert lock_files(folder) == [".lock"]
        holder = read_lock(folder)
        assert holder is not None and holder.pid == winner.process.pid
        assert winner.release() == "released"
        assert lock_files(folder) == []


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_takers_in_turn_never_two_hold(tmp_path: Path, stale: bool) -> None:
    """Threads that take, renew and release as fast as they can; with `stale`, each lock is void as soon as it is there."""
    inside: list[int] = []
    rounds = [0] * 8
    errors: list[BaseException] = []

    def take(number: int) -> None:
        try:
            while rounds[number] < 8:
                lock = RunLock(tmp_path, renew_seconds=0.001)
                try:
                    lock.acquire()
                except ConfigurationError:
                    time.sleep(0.0005)
                    continue
                inside.append(number)
                assert inside == [number], "two hold the lock"
                time.sleep(0.001)
                assert not lock.lost
                inside.remove(number)
                if stale and rounds[number] % 2:
                    # It dies: its thread stops, its lock stays, and names a process that is gone.
                    lock._stop.set()
                    assert lock._thread is not None
                    lock._thread.join()
                    rewrite(tmp_path, pid=2**22 + 1)
                else:
                    lock.release()
                rounds[number] += 1
        except BaseException as error:  # noqa: BLE001 - for the main thread
            errors.append(error)
            rounds[number] = 8

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    assert rounds == [8] * 8


# -- when a lock is stale ------------------------------------------------------------------------------------------


def test_process_that_lives_here_holds_its_lock() -> None:
    assert not here().is_stale()


@pytest.mark.parametrize(
    "changes",
    [{"pid": 2**22 + 1}, {"start_time": 1}, {"boot_id": "of the boot before"}, {"heartbeat": time.time() - 3600}],
    ids=lambda changes: next(iter(changes)),
)
def test_lock_is_stale_when_its_process_is_gone(changes: dict[str, object]) -> None:
    assert here(**changes).is_stale()


def test_process_of_another_container_is_not_looked_up_here() -> None:
    other = here(pid=2**22 + 1, process_namespace="pid:[1]")
    assert not other.is_stale()
    assert dataclasses.replace(other, heartbeat=time.time() - 121).is_stale()


def test_process_of_another_host_is_judged_by_its_sign_of_life() -> None:
    other = here(host="another", pid=2**22 + 1, boot_id="another")
    assert not other.is_stale()
    assert not dataclasses.replace(other, heartbeat=time.time() - 100).is_stale()
    assert dataclasses.replace(other, heartbeat=time.time() - 121).is_stale()


def test_requeued_job_takes_its_own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = here(host="another", slurm_job="55")
    (tmp_path / ".lock").write_text(json.dumps(dataclasses.asdict(other)))
    with pytest.raises(ConfigurationError, match=r"in use by process .* on another, SLURM job 55"):
        RunLock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "56")
    with pytest.raises(ConfigurationError, match="in use"):
        RunLock(tmp_path).acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    with RunLock(tmp_path):
        taken = read_lock(tmp_path)
        assert taken is not None and taken.pid == os.getpid()


def test_second_step_of_one_job_is_refused(
    tmp_path: Path, hold: Callable[..., Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job number is equal, yet the process lives: this is no requeue."""
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    assert hold(SLURM_JOB_ID="55").line() == "holds"
    with pytest.raises(ConfigurationError, match="in use"):
        RunLock(tmp_path).acquire()


# -- what interrupted processes leave ------------------------------------------------------------------------------


def test_taker_that_died_in_the_middle_is_followed(tmp_path: Path) -> None:
    """It had claimed the stale lock, and did not come to replace it."""
    dead = here(pid=2**22 + 1)
    second = dataclasses.replace(dead, pid=2**22 + 2, token="second")
    (tmp_path / ".lock").write_text(json.dumps(dataclasses.asdict(dead)))
    (tmp_path / f".lock.{dead.token}").write_text(json.dumps(dataclasses.asdict(second)))
    with RunLock(tmp_path):
        assert lock_files(tmp_path) == [".lock"]
    # While that taker lives, it is the one that holds the folder.
    (tmp_path / ".lock").write_text(json.dumps(dataclasses.asdict(dead)))
    (tmp_path / f".lock.{dead.token}").write_text(json.dumps(dataclasses.asdict(here(token="second"))))
    with pytest.raises(ConfigurationError, match=f"in use by process {os.getpid()} on"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 4}', "\0\0"])
def test_lock_that_makes_no_sense_holds_until_it_is_old(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    with pytest.raises(ConfigurationError, match=r"in use by .* on an unknown host"):
        RunLock(tmp_path).acquire()
    os.utime(tmp_path / ".lock", (time.time() - 121,) * 2)
    with RunLock(tmp_path):
        assert lock_files(tmp_path) == [".lock"]


def test_lock_that_was_removed_by_hand_is_written_again(tmp_path: Path) -> None:
    with RunLock(tmp_path, renew_seconds=0.02) as lock:
        (tmp_path / ".lock").unlink()
        until((tmp_path / ".lock").exists)
        assert not lock.lost
        with pytest.raises(ConfigurationError, match="in use"):
            RunLock(tmp_path).acquire()


def test_sign_of_life_that_cannot_be_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full for a moment: the next sign of life is written, and the lock is not lost."""
    failures: list[int] = []

    def fail_twice(path: Path, value: object) -> None:
        if len(failures) < 2:
            failures.append(1)
            raise MegagammaError("No space left on device")
        write_json(path, value)

    monkeypatch.setattr(lock_module, "write_json", fail_twice)
    with RunLock(tmp_path, renew_seconds=0.02) as lock:
        first = read_lock(tmp_path)
        until(lambda: read_lock(tmp_path) != first)
        assert len(failures) == 2
        assert not lock.lost
    assert lock_files(tmp_path) == []


def test_former_holder_that_writes_over_its_successor(tmp_path: Path) -> None:
    """Suspended between its claim and its write, it undoes the take-over once; the successor puts that right."""
    old = here(pid=2**22 + 1)
    (tmp_path / ".lock").write_text(json.dumps(dataclasses.asdict(old)))
    with RunLock(tmp_path, renew_seconds=0.05) as lock:
        (tmp_path / ".lock").write_text(json.dumps(dataclasses.asdict(old)))
        until(lambda: json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid())
        assert not lock.lost


def test_old_leftovers_are_removed(tmp_path: Path) -> None:
    """And nothing else that is old: `.lock.mine` is a name that this tool does not give."""
    old, young = ".lock." + "a" * 32, ".lock." + "b" * 32
    for name, age in (
        (old, 5000), (old + ".new", 5000), ("..lock.0123456789ab", 5000), ("..lock.tmp_0a1b", 5000), (young, 10),
        (".other", 5000), (".lock.mine", 5000),
    ):  # fmt: skip
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with RunLock(tmp_path):
        assert lock_files(tmp_path) == [".lock", young, ".lock.mine", ".other"]


def test_fork_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert lock_files(tmp_path) == [".lock"]
