"""A file under its final name is whole, or it is what it was."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import (
    advice,
    atomic_directory,
    atomic_file,
    copy_file,
    directory_lock,
    publish_directory,
    recover_directory,
    remove_directory,
    require_writable,
    write_json,
    write_text,
)


def test_text_is_written_into_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "grüße\n")
    assert path.read_text(encoding="utf-8") == "grüße\n"
    # Readable by others, unlike the temporary file that it was.
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["note.txt"]


def test_json_is_indented_and_ends_its_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [1]}
    assert text.endswith("}\n")
    assert text.count("\n") > 2


def test_encoding_does_not_depend_on_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under LC_ALL=C a text file's default encoding may be ASCII; config.yaml is read back as UTF-8."""
    import tempfile

    given: list[Any] = []
    real = tempfile.NamedTemporaryFile
    monkeypatch.setattr(
        tempfile, "NamedTemporaryFile", lambda *a, **k: given.append(k.get("encoding")) or real(*a, **k)
    )
    write_text(tmp_path / "note.txt", "ü")
    assert given == ["utf-8"]


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
def test_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "x.json"
    write_text(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(MegagammaError, match=r"x\.json: cannot be written \(No space left.*\): free some space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    seen: list[str] = []
    real = os.fsync
    # At the moment of the sync all of the text is in the temporary file, and the name still holds the old one.
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_text()) or real(descriptor))
    write_text(path, "new" * 100_000)
    assert seen == ["old"]
    assert path.read_text() == "new" * 100_000


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MegagammaError, match="a file stands where a folder is needed"):
        write_text(tmp_path / "file" / "x.json", "text")
    with pytest.raises(MegagammaError, match=r"run\.folder=.*file: cannot be written"):
        require_writable(tmp_path / "file", "run.folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    assert require_writable(tmp_path / "a" / "b", "run.folder") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EIO])
def test_every_failure_has_advice(number: int) -> None:
    assert "choose another folder" in advice(OSError(number, os.strerror(number)))


def test_file_that_exists_is_said_to_be_in_the_way(tmp_path: Path) -> None:
    # mkdir over a file gives EEXIST, not ENOTDIR.
    assert "a file stands where a folder is needed" in advice(OSError(errno.EEXIST, "File exists"))


def test_bytes_are_written_and_copied_whole(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.bin", "wb") as file:
        file.write(b"\x00\xff")
    copy_file(tmp_path / "a.bin", tmp_path / "deep" / "b.bin")
    assert (tmp_path / "deep" / "b.bin").read_bytes() == b"\x00\xff"
    with pytest.raises(MegagammaError, match=r"b\.bin: cannot be written \(No such file"):
        copy_file(tmp_path / "missing", tmp_path / "deep" / "b.bin")
    assert (tmp_path / "deep" / "b.bin").read_bytes() == b"\x00\xff"


def test_another_error_than_the_disks_passes_and_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "x") as file:
        file.write(f"half {1 // 0}")
    assert (tmp_path / "x").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


# -- folders ---------------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def content(folder: Path) -> str:
    return (folder / "file").read_text()


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()  # an empty one is taken
    with atomic_directory(output) as partial:
        (partial / "deep").mkdir()
        (partial / "file").write_text("new")
        assert partial.parent == tmp_path and partial.name == ".out.partial"
        assert not list(output.iterdir())
    assert (content(output), names(output), names(tmp_path)) == ("new", ["deep", "file"], ["out"])


def test_a_folder_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with atomic_directory(output) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_directory(output, may_replace=lambda _: True) as partial:
        (partial / "file").write_text(f"half {1 // 0}")
    assert (content(output), names(tmp_path)) == ("old", ["out"])
    with pytest.raises(MegagammaError, match=r"out: cannot be written \(No space left"), atomic_directory(output):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (content(output), names(tmp_path)) == ("old", ["out"])


def test_only_what_may_be_replaced_is_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "file").write_text("precious")
    asked: list[Path] = []
    for may_replace in (None, lambda folder: bool(asked.append(folder))):
        with pytest.raises(MegagammaError, match="not empty"), atomic_directory(output, may_replace=may_replace) as new:
            (new / "file").write_text("new")
        assert (content(output), names(tmp_path)) == ("precious", ["out"])
    assert asked == [output]
    with atomic_directory(output, may_replace=lambda folder: content(folder) == "precious") as new:
        (new / "file").write_text("new")
    assert (content(output), names(tmp_path)) == ("new", ["out"])


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


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state that a kill leaves: the old folder set aside, the new one not there yet."""
    output = tmp_path / "out"
    for name, text in ((".out.replaced", "old"), (".out.partial", "complete")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    with pytest.raises(ZeroDivisionError), atomic_directory(output):
        raise ZeroDivisionError
    assert (content(output), names(tmp_path)) == ("old", ["out"])
    # After the second rename the old one is only left over.
    (tmp_path / ".out.replaced").mkdir()
    recover_directory(output)
    assert (content(output), names(tmp_path)) == ("old", ["out"])
    # And without a kill, when the second rename fails.
    (tmp_path / ".out.partial").mkdir()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        publish_directory(tmp_path / ".out.partial", output)
    assert content(output) == "old" and not (tmp_path / ".out.replaced").exists()


def test_every_folder_is_synced_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megagamma import files

    synced: list[tuple[str, bool]] = []
    final, partial = tmp_path / "final", tmp_path / ".final.partial"
    (partial / "deep").mkdir(parents=True)
    monkeypatch.setattr(files, "sync_folder", lambda folder: synced.append((Path(folder).name, final.exists())))
    publish_directory(partial, final)
    assert synced == [(".final.partial", False), ("deep", False), (tmp_path.name, True)]


def test_a_folder_is_hidden_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    folder, seen = tmp_path / "step", []
    folder.mkdir()
    (folder / "file").touch()
    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: seen.append(names(tmp_path)) or real(path, **more))
    remove_directory(folder)
    assert seen == [[".step.deleted"]] and not names(tmp_path)
    with pytest.raises(FileNotFoundError):
        remove_directory(folder)
