"""A file under its final name is whole, or it is what it was."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagamma.errors import MegagammaError
from megagamma.files import advice, atomic_file, copy_file, require_writable, write_json, write_text


def test_text_is_written_into_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "grüße\n")
    assert path.read_text(encoding="utf-8") == "grüße\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["note.txt"]


def test_json_is_indented_and_ends_its_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [1]}
    assert text.endswith("}\n")
    assert text.count("\n") > 2


def test_encoding_does_not_depend_on_the_locale(tmp_path: Path) -> None:
    """Under LC_ALL=C a text file's default encoding may be ASCII; config.yaml is read back as UTF-8."""
    code = f"from megagamma.files import write_text; write_text({str(tmp_path / 'note.txt')!r}, chr(252))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (tmp_path / "note.txt").read_bytes() == "ü".encode()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_new_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "deep" / "new.txt", "text")
        (tmp_path / "by_hand").touch()
        (tmp_path / "folder_by_hand").mkdir()
    finally:
        os.umask(before)

    def mode(name: str) -> int:
        return (tmp_path / name).stat().st_mode & 0o7777

    assert mode("deep/new.txt") == mode("by_hand") == 0o666 & ~umask
    assert mode("deep") == mode("folder_by_hand")


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o640, 0o444])
def test_a_file_that_is_replaced_keeps_its_rights(tmp_path: Path, mode: int) -> None:
    write_text(tmp_path / "x", "old")
    (tmp_path / "x").chmod(mode)
    write_text(tmp_path / "x", "new")
    assert ((tmp_path / "x").read_text(), (tmp_path / "x").stat().st_mode & 0o7777) == ("new", mode)


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
def test_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "x.json"
    write_text(path, "old")
    path.chmod(0o600)  # which is kept

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
