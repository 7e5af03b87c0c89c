"""What in a folder is this tool's own, and that nothing else is deleted."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megagamma.errors import ConfigurationError, DataError
from megagamma.owned import LIST, discard, list_own_files, own_files, require_own, require_place, strangers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "folder"
    (found / "deep").mkdir(parents=True)
    (found / "a.json").write_text("{}")
    (found / "deep" / "b.safetensors").write_text("numbers")
    list_own_files(found)
    return found


def names(folder: Path, **more: bool) -> list[str]:
    return [str(found) for found in strangers(folder, **more)]


def test_everything_is_listed_with_size_and_checksum(folder: Path) -> None:
    found = json.loads((folder / LIST).read_text())
    assert found["files"].keys() == {"a.json", "deep/b.safetensors"}
    assert found["files"]["a.json"]["bytes"] == 2
    assert re.fullmatch("xxh3_128:[0-9a-f]{32}", found["files"]["a.json"]["digest"])
    assert not strangers(folder)
    assert not strangers(folder.with_name("missing"))


def test_strangers_are_named(folder: Path) -> None:
    (folder / "a.json").write_text("[]")  # of the same size
    (folder / "notes.txt").touch()
    (folder / ".hidden").touch()
    (folder / "deep" / "more").mkdir()
    (folder / "link").symlink_to(folder / "a.json")
    (folder / "deep" / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    found = [".hidden", "a.json (changed)", "deep/dangling", "deep/more/", "link", "notes.txt", "pipe"]
    assert names(folder) == found
    assert [str(one) for one in strangers(folder, allowed=("deep", "pipe"))] == [
        name for name in found if name != "pipe" and not name.startswith("deep")
    ]
    with pytest.raises(
        DataError, match=r"^--out x: holds \.hidden, a\.json \(changed\), .* and 3 more, not as this tool"
    ):
        require_own(folder, "--out x", error=DataError)


def test_changed_numbers_are_corrupt_and_nobodys_work(folder: Path) -> None:
    (folder / "deep" / "b.safetensors").write_text("cut")
    assert names(folder) == []
    assert names(folder, strict=True) == ["deep/b.safetensors (changed)"]
    (folder / "deep" / "b.safetensors").unlink()
    (folder / "deep" / "b.safetensors").symlink_to(folder / "a.json")
    assert names(folder) == ["deep/b.safetensors"]


@pytest.mark.parametrize("how", ["edited", "put in its place", "edited and touched"])
def test_a_change_is_seen_by_time_size_or_content(folder: Path, tmp_path: Path, how: str) -> None:
    """A file that was not changed since the list was written is not read; `mv` of an older file is a change."""
    file = folder / "a.json"
    (tmp_path / "older").write_text("[]")
    os.utime(tmp_path / "older", (1, 1))
    if how == "put in its place":
        (tmp_path / "older").rename(file)
    else:
        file.write_text("[]")
        if how == "edited and touched":
            os.utime(file, (1, 1))
    assert names(folder) == ["a.json (changed)"]
    file.write_text("{}")
    assert names(folder) == [], "as it was"


def test_a_copy_is_known_by_its_checksums(folder: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "copy")], check=True)
    os.utime(tmp_path / "copy" / LIST, (1, 1))
    assert names(tmp_path / "copy") == []
    (tmp_path / "copy" / "a.json").write_text("[]")
    assert names(tmp_path / "copy") == ["a.json (changed)"]


BROKEN_LISTS = ["", "[]", "{", '{"format": "x"}', '{"format": "megagamma.own_files", "files": {"a.json": 3}}']
BROKEN_LISTS += [
    '{"format": "megagamma.own_files", "files": {"a.json": {"bytes": 2, "digest": "md5:1"}}}',
    "[" * 100_000,
]


@pytest.mark.parametrize("text", BROKEN_LISTS, ids=lambda text: text[:45])
def test_a_list_that_is_not_what_was_written_lists_nothing(folder: Path, text: str) -> None:
    (folder / LIST).write_text(text)
    assert "deep/b.safetensors" in names(folder)
    assert discard(folder), "nothing is deleted"
    assert (folder / "deep" / "b.safetensors").exists()


def test_names_outside_the_folder_mean_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    value = json.loads((folder / LIST).read_text())
    for name in ("../precious", str(tmp_path / "precious")):
        value["files"][name] = {"bytes": 4, "digest": "sha256:0"}
    (folder / LIST).write_text(json.dumps(value))
    assert discard(folder) == []
    assert not folder.exists() and (tmp_path / "precious").read_text() == "mine"


def test_what_is_left_of_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "deep" / "notes.txt").write_text("mine")
    assert [str(one) for one in discard(folder)] == ["deep/notes.txt"]
    assert sorted(path.name for path in folder.rglob("*")) == [LIST, "deep", "notes.txt"]
    (folder / "deep" / "notes.txt").unlink()
    assert discard(folder) == [] and not folder.exists()


def test_strangers_move_to_the_successor(folder: Path, tmp_path: Path) -> None:
    successor = tmp_path / "new"
    successor.mkdir()
    (successor / "same.txt").write_text("same")
    (successor / "taken.txt").write_text("new")
    (successor / "file").write_text("new")
    for name, text in (("same.txt", "same"), ("taken.txt", "mine"), ("deep/notes.txt", "mine")):
        (folder / name).write_text(text)
    (folder / "file").mkdir()
    (folder / "file" / "x").write_text("mine")
    assert [str(one) for one in discard(folder, successor)] == ["file/x", "taken.txt"]
    assert (successor / "deep" / "notes.txt").read_text() == "mine"
    assert (successor / "taken.txt").read_text() == (successor / "file").read_text() == "new"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "file/x", "taken.txt", LIST,
    }  # fmt: skip


def test_a_folder_of_somebody_else_has_no_own_files(tmp_path: Path) -> None:
    for name in ("manifest.json", "checkpoint.json", "config.json", "train.bin", "model.safetensors"):
        (tmp_path / name).write_text('{"name": "a web page"}')
    assert own_files(tmp_path) is None
    assert len(strangers(tmp_path)) == 5
    # A manifest that is no JSON: by their names, the token files are ours, and nothing else is.
    (tmp_path / "manifest.json").write_text("{")
    assert names(tmp_path) == ["checkpoint.json", "config.json", "model.safetensors"]


def test_owners_are_found_through_links(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").touch()
    (tmp_path / "link").symlink_to(checkpoint)
    for path in (tmp_path / "link" / "new", checkpoint / "a" / "b"):
        with pytest.raises(ConfigurationError, match=rf"^--out x: lies in the checkpoint {checkpoint}: choose another"):
            require_place(path, "--out x", itself=(), around=("run",))
    require_place(tmp_path / "run" / "hf", "--out x", itself=(), around=("run",))


def test_make_clean_deletes_neither_runs_nor_data(tmp_path: Path, root: Path) -> None:
    (tmp_path / "Makefile").write_text((root / "Makefile").read_text())
    for name in (
        "runs/mine",
        "data/mine",
        ".venv/bin",
        ".mypy_cache",
        "megagamma/__pycache__",
        "tools",
        "tests",
        "eval",
    ):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"Makefile", "runs", "runs/mine", "data", "data/mine", "megagamma", "tools", "tests", "eval"}
