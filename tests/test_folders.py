"""A folder under its final name is whole, or it is what it was; one process at a time writes it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from megagamma import folders
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.folders import (
    atomic_directory,
    directory_lock,
    publish_directory,
    recover_at_start,
    recover_directory,
    remove_directory,
)
from megagamma.owned import LIST, list_own_files


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def content(folder: Path) -> str:
    return (folder / "file").read_text()


def publish(output: Path, text: str, replace: bool = True) -> None:
    with atomic_directory(output, may_replace=(lambda _: True) if replace else None) as partial:
        (partial / "file").write_text(text)


@pytest.fixture(params=["exchange", "set aside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of replacing a folder; the second is that of NFS and Lustre."""
    if request.param == "set aside":
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    return str(request.param)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()  # an empty one is taken
    with atomic_directory(output) as partial:
        (partial / "deep").mkdir()
        (partial / "file").write_text("new")
        assert partial.parent == tmp_path and partial.name == ".out.partial"
        assert not list(output.iterdir())
    assert (content(output), names(output), names(tmp_path)) == ("new", [LIST, "deep", "file"], ["out"])


def test_a_folder_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "out"
    publish(output, "old")
    with pytest.raises(ZeroDivisionError), atomic_directory(output, may_replace=lambda _: True) as partial:
        (partial / "file").write_text(f"half {1 // 0}")
    assert (content(output), names(tmp_path)) == ("old", ["out"])
    with pytest.raises(MegagammaError, match=r"out: cannot be written \(No space left"), atomic_directory(output):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (content(output), names(tmp_path)) == ("old", ["out"])


def test_only_what_may_be_replaced_is_replaced(tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    publish(output, "precious")
    asked: list[Path] = []
    for may_replace in (None, lambda folder: bool(asked.append(folder))):
        with pytest.raises(MegagammaError, match="not empty"), atomic_directory(output, may_replace=may_replace) as new:
            (new / "file").write_text("new")
        assert (content(output), names(tmp_path)) == ("precious", ["out"])
    assert set(asked) == {output}
    with atomic_directory(output, may_replace=lambda folder: content(folder) == "precious") as new:
        (new / "file").write_text("new")
    assert (content(output), names(tmp_path)) == ("new", ["out"])


def test_what_somebody_else_put_there_is_named_and_stays(tmp_path: Path) -> None:
    output = tmp_path / "out"
    publish(output, "old")
    (output / "notes.txt").write_text("mine")
    (output / "file").write_text("edited")
    with pytest.raises(ConfigurationError, match=r"--out .*out: holds file \(changed\), notes\.txt, not as this tool"):
        publish(output, "new")
    assert (content(output), names(output)) == ("edited", [LIST, "file", "notes.txt"])
    # Negative control: with its own files alone it is replaced.
    (output / "notes.txt").unlink()
    (output / "file").write_text("old")
    publish(output, "new")
    assert content(output) == "new"


def test_what_comes_while_it_is_written_moves_along(tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    publish(output, "old")
    with atomic_directory(output, may_replace=lambda _: True) as partial:
        (partial / "file").write_text("new")
        (output / "deep").mkdir()
        (output / "deep" / "notes.txt").write_text("mine")
        (output / "file").write_text("edited meanwhile")
    assert (content(output), (output / "deep" / "notes.txt").read_text()) == ("new", "mine")
    # Its place is taken by the new file: both are there.
    assert names(tmp_path) == ["out", "out.kept-1"]
    assert (names(tmp_path / "out.kept-1"), content(tmp_path / "out.kept-1")) == ([LIST, "file"], "edited meanwhile")


def test_carried_folders_outlive_a_replacement(tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    publish(output, "old")
    (output / "eval").mkdir()
    (output / "eval" / "scores.json").write_text("{}")
    with atomic_directory(output, may_replace=lambda _: True, carried=("eval",)) as partial:
        (partial / "file").write_text("new")
    assert (content(output), (output / "eval" / "scores.json").read_text(), names(tmp_path)) == ("new", "{}", ["out"])


def test_the_rights_of_a_folder_that_is_replaced_are_kept(tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    publish(output, "old")
    output.chmod(0o2750)
    publish(output, "new")
    assert output.stat().st_mode & 0o7777 == 0o2750


def test_an_unfinished_folder_that_is_not_ours_stays(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"\.out\.partial is in the way"):
        publish(tmp_path / "out", "new")
    assert names(partial) == ["thesis.txt"]
    # Negative control: what a killed attempt leaves goes.
    (partial / LIST).touch()
    publish(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with atomic_directory(output) as partial:
        (partial / "file").write_text("first")
        with (
            pytest.raises(ConfigurationError, match=r"--out .*another process writes it now"),
            atomic_directory(output),
        ):
            pass
        with pytest.raises(ConfigurationError, match=r"--save .*another process"), directory_lock(output, "--save"):
            pass
        assert content(partial) == "first", "the second writer touches nothing"
    assert content(output) == "first"
    with directory_lock(output):
        assert names(tmp_path) == [".out.lock", "out"]
    assert names(tmp_path) == ["out"]


def test_a_writer_that_waits(tmp_path: Path) -> None:
    import threading

    output, waiting, order = tmp_path / "out", threading.Event(), []

    def second() -> None:
        with directory_lock(output, waiting=waiting.set):
            order.append("second")

    with directory_lock(output, waiting=lambda: order.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def _count(output: Path, rounds: int, patient: bool, careless: bool) -> None:
    """Add one to a number in a file, under the lock, so often that two holders at once are noticed."""
    number = output.parent / "number"
    done = 0
    while done < rounds:
        try:
            with _careless_lock(output) if careless else directory_lock(output, waiting=list if patient else None):
                before = int(number.read_text())
                os.sched_yield()
                number.write_text(str(before + 1))
                done += 1
        except ConfigurationError:
            time.sleep(0.0005)


def _careless_lock(output: Path):  # type: ignore[no-untyped-def]
    """The lock as it was: its file is removed, and who has opened it before holds a lock on a file without a name."""
    import contextlib
    import fcntl

    @contextlib.contextmanager
    def lock():  # type: ignore[no-untyped-def]
        path = output.with_name(".out.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    return lock()


@pytest.mark.parametrize("careless", [False, True], ids=["ours", "negative control"])
def test_many_processes_take_turns(tmp_path: Path, careless: bool) -> None:
    """Some wait and some try again at once; every turn is counted once."""
    (tmp_path / "number").write_text("0")
    context, rounds = multiprocessing.get_context("fork"), 100
    processes = [
        context.Process(target=_count, args=(tmp_path / "out", rounds, index % 2 == 0, careless)) for index in range(6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes, counted = [process.exitcode for process in processes], (tmp_path / "number").read_text()
    if careless:
        # Two holders at once: a turn is lost, or a number is read while it is written.
        assert counted != str(6 * rounds) or any(codes)
    else:
        assert (codes, counted) == ([0] * 6, str(6 * rounds))
        assert names(tmp_path) == ["number"]


def listed(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "file").write_text(text)
    list_own_files(folder)


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state that a kill leaves: the old folder set aside, the new one not there yet."""
    output = tmp_path / "out"
    listed(tmp_path / ".out.replaced", "old")
    listed(tmp_path / ".out.partial", "complete")
    with pytest.raises(ZeroDivisionError), atomic_directory(output):
        raise ZeroDivisionError
    assert (content(output), names(tmp_path)) == ("old", ["out"])
    # After the second rename the old one is only left over.
    listed(tmp_path / ".out.replaced", "older")
    recover_at_start(output)
    assert (content(output), names(tmp_path)) == ("old", ["out"])
    # An empty folder that somebody made in its place is no successor.
    output.rename(tmp_path / ".out.replaced")
    output.mkdir()
    recover_directory(output)
    assert (content(output), names(tmp_path)) == ("old", ["out"])
    # And without a kill, when the rename fails.
    listed(tmp_path / ".out.partial", "new")
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial") and target == output:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        publish_directory(tmp_path / ".out.partial", output)
    assert content(output) == "old" and not (tmp_path / ".out.replaced").exists()


def test_recovery_leaves_a_folder_that_another_process_writes(tmp_path: Path) -> None:
    """Between the two renames of its owner nothing may be put back."""
    output = tmp_path / "out"
    listed(tmp_path / ".out.replaced", "old")
    with directory_lock(output):
        recover_at_start(output)
        assert not output.exists()
    recover_at_start(output)
    assert content(output) == "old"


def test_every_folder_is_synced_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    final, partial = tmp_path / "final", tmp_path / ".final.partial"
    (partial / "deep").mkdir(parents=True)
    monkeypatch.setattr(folders, "sync_folder", lambda folder: synced.append((Path(folder).name, final.exists())))
    publish_directory(partial, final)
    assert synced == [(".final.partial", False), ("deep", False), (tmp_path.name, True)]


def test_a_folder_is_hidden_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tmp_path / "step", []
    listed(folder, "text")
    real = folders.discard
    monkeypatch.setattr(
        folders, "discard", lambda path, successor: seen.append(names(tmp_path)) or real(path, successor)
    )
    remove_directory(folder)
    assert seen == [[".step.deleted"]] and not names(tmp_path)
    with pytest.raises(FileNotFoundError):
        remove_directory(folder)


def test_a_link_in_place_of_a_folder_is_never_followed(tmp_path: Path, way: str) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    listed(elsewhere, "mine")
    output.symlink_to(elsewhere)
    listed(tmp_path / ".out.partial", "new")
    publish_directory(tmp_path / ".out.partial", output)
    assert (content(output), content(elsewhere)) == ("new", "mine")
    assert (tmp_path / "out.kept-1").is_symlink()


def test_exchange(tmp_path: Path) -> None:
    """On this file system, if it can; else it says so."""
    listed(tmp_path / "a", "a")
    listed(tmp_path / "b", "b")
    before = os.stat(tmp_path / "a").st_ino
    if not folders.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert (content(tmp_path / "a"), content(tmp_path / "b")) == ("b", "a")
    assert os.stat(tmp_path / "b").st_ino == before
    assert not folders.exchange(tmp_path / "a", tmp_path / "missing")
    assert not folders.exchange(tmp_path / "a", Path("/proc/self"))
