"""A run's folder that cannot be used or belongs to another run; disks that are full; checkpoints that are corrupt."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.processes import attempt, attempt_with_small_files, finish, losses, snapshot, start
from support.ranks import RankPool

from megagamma.checkpoint.reader import read_manifest, steps_saved, verify
from megagamma.data.preparation.prepare import embedded_settings, prepare

Refuse = Callable[..., str]


@pytest.fixture
def refused(one_rank: RankPool, data_cache: str) -> Refuse:
    """Run with a folder; returns the text of the expected error. Whatever the folder held must stay."""

    def run(folder: Path, *arguments: str, kind: str = "CheckpointError") -> str:
        before = snapshot(folder) if folder.is_dir() else None
        given = ["--run.folder", str(folder), "--data.cache", data_cache, *arguments]
        found, code, text = one_rank.run(attempt, given)[0]
        assert (found, code) == (kind, 2), text
        assert "\n" not in text
        if before is not None:
            assert snapshot(folder) == before
        return text

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str) -> Path:
    """A run of 2 of 4 steps, with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["--run.folder", str(folder), "--data.cache", data_cache, "--run.steps", "2"]
    assert one_rank.run(attempt, [*arguments, "--checkpoint.interval", "1"], True)[0] == ("", 0, "")
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


# -- the folder ------------------------------------------------------------------------------------------------


def test_folder_that_is_a_file(refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    text = refused(tmp_path / "run", kind="MegagammaError")
    assert f"run.folder={tmp_path / 'run'}: cannot be written" in text
    assert "a file stands where a folder is needed" in text
    assert (tmp_path / "run").read_text() == "mine"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real, small file system of its own (12 MiB), to be filled or made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_read_only_disk(refused: Refuse, disk: Path) -> None:
    (disk / "run").mkdir()
    (disk / "run" / "mine.txt").write_text("mine")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk / "run", disk / "new"):
        text = refused(folder, kind="MegagammaError")
        assert f"run.folder={folder}: cannot be written" in text
        assert "the file system is read-only: choose another folder" in text


def test_full_disk_at_the_start(refused: Refuse, disk: Path) -> None:
    fill(disk)
    text = refused(disk / "run", kind="MegagammaError")
    assert "run.folder=" in text
    assert "free some space" in text


def fill(disk: Path, leave: int = 0) -> None:
    """Take all space but `leave` bytes."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    if leave:
        with open(disk / "filler", "r+b") as file:
            file.truncate((disk / "filler").stat().st_size - leave)


@pytest.mark.launcher
def test_disk_that_fills_up_in_a_save(disk: Path, data_cache: str, one_rank: RankPool) -> None:
    """A checkpoint has 3.5 MB: the fourth does not fit. Through the command line, whose last word is at stake."""
    run = disk / "run"
    arguments = ["--run.folder", str(run), "--data.cache", data_cache, "--run.steps", "8", "--checkpoint.interval", "1"]
    arguments += ["--checkpoint.keep_last", "0", "--logging.console_interval", "100"]
    code, _, err = finish(start(arguments))
    assert code == 2, err
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "checkpoint of step 4" in said[0]
    assert "No space left" in said[0]
    assert "free some space" in said[0]
    assert "the ones before are untouched" in said[0]
    root = run / "checkpoints"
    assert steps_saved(root) == [1, 2, 3]
    for step in (1, 2, 3):
        verify(root / f"step_{step:08d}", read_manifest(root / f"step_{step:08d}"))
    assert not list(root.glob(".step_*")), "what was half written takes no space"
    # With space again, the same command goes on.
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert one_rank.run(attempt, arguments, True)[0] == ("", 0, "")
    assert len(losses(run)) == 8


@pytest.mark.parametrize("leave", [0, 65536, 1 << 20])
def test_disk_that_is_full_at_any_point(
    disk: Path, data_cache: str, one_rank: RankPool, trained: Path, leave: int
) -> None:
    """Whatever the last free byte went to, metrics or a checkpoint: one clear error, the checkpoints whole."""
    shutil.copytree(trained, disk / "run")
    fill(disk, leave)
    given = ["--run.folder", str(disk / "run"), "--data.cache", data_cache, "--run.steps", "2000"]
    kind, code, text = one_rank.run(attempt, [*given, "--checkpoint.interval", "3"], True)[0]
    assert kind in ("MegagammaError", "CheckpointError"), text
    assert code == 2
    assert "free some space" in text
    root = disk / "run" / "checkpoints"
    assert steps_saved(root) == [1, 2]
    verify(root / "step_00000002", read_manifest(root / "step_00000002"))


def test_files_that_may_not_grow(one_rank: RankPool, copy: Path, data_cache: str) -> None:
    """The same without the rights to mount: a limit of 1 MB per file, which a checkpoint's files exceed."""
    given = ["--run.folder", str(copy), "--data.cache", data_cache, "--run.steps", "4"]
    kind, code, text = one_rank.run(attempt_with_small_files, given, 1_000_000)[0]
    assert (kind, code) == ("CheckpointError", 2), text
    assert "checkpoint of step 4" in text
    assert "the ones before are untouched" in text
    assert steps_saved(copy / "checkpoints") == [1, 2]
    assert not list((copy / "checkpoints").glob(".step_*"))
    assert one_rank.run(attempt, given, True)[0] == ("", 0, "")
    assert len(losses(copy)) == 4


def test_folder_that_belongs_to_something_else(refused: Refuse, copy: Path, tmp_path: Path, data_cache: str) -> None:
    export = tmp_path / "hf"
    export.mkdir()
    for name in ("config.json", "parity.json"):
        (export / name).write_text("{}")
    newest = copy / "checkpoints" / "step_00000002"
    shutil.copytree(Path(data_cache) / "tiny", tmp_path / "tiny")
    for folder, owner in [
        (newest, f"is the checkpoint {newest}"),
        (newest / "run", f"lies in the checkpoint {newest}"),
        (copy / "checkpoints" / "step_00000099", "lies in the checkpoints of a run"),
        (copy / "checkpoints", "is the checkpoints of a run"),
        (export, f"is the exported model {export}"),
        (tmp_path / "tiny" / "run", f"lies in the prepared data {tmp_path / 'tiny'}"),
    ]:
        text = refused(folder, kind="ConfigurationError")
        assert f"run.folder={folder}: {owner}" in text
        assert folder.exists() is (folder in (newest, copy / "checkpoints", export)), "nothing was made"


def test_all_checkpoints_gone(one_rank: RankPool, copy: Path, data_cache: str) -> None:
    """The run begins anew, and says what has become of its numbers."""
    before = (copy / "metrics.jsonl").read_bytes()
    shutil.rmtree(copy / "checkpoints")
    given = ["--run.folder", str(copy), "--data.cache", data_cache, "--run.steps", "2", "--checkpoint.interval", "1"]
    assert one_rank.run(attempt, given, True)[0] == ("", 0, "")
    assert (copy / "metrics.before-1.jsonl").read_bytes() == before
    assert len(losses(copy)) == 2
    events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    assert any("kept in metrics.before-1.jsonl" in event.get("text", "") for event in events)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "samples.jsonl"])
def test_a_byte_that_is_no_text_stops_no_resume(one_rank: RankPool, copy: Path, data_cache: str, name: str) -> None:
    path = copy / name
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(content + b'\xff\xfe\n{"step": 1, "event": "note", "text": "\xff"}\n')
    given = ["--run.folder", str(copy), "--data.cache", data_cache, "--run.steps", "3"]
    assert one_rank.run(attempt, given, True)[0] == ("", 0, "")
    found = path.read_bytes()
    assert found.startswith(content) and b'"note"' in found, "no other line is lost"
    if name != "events.jsonl":  # which is not trimmed
        assert path.with_name(name.replace(".jsonl", ".unreadable.jsonl")).read_bytes() == b"\xff\xfe\n"


# -- a folder of another run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("model.hidden_size", "128", "model.hidden_size: 64 -> 128"),
        ("model.norm_epsilon", "1e-5", "model.norm_epsilon: 1e-12 -> 1e-05"),
        ("init.gamma", "0.5", "init.gamma: 1.0 -> 0.5"),
        ("run.seed", "7", "run.seed: 1234 -> 7"),
    ],
)
def test_resume_of_another_model(refused: Refuse, copy: Path, option: str, value: str, said: str) -> None:
    text = refused(copy, f"--{option}", value)
    assert said in text
    assert "give the same values, or another run.folder" in text


def test_resume_with_another_tokenizer(refused: Refuse, copy: Path, tmp_path: Path) -> None:
    prepare(embedded_settings("tiny", str(tmp_path), vocab_size=400))
    text = refused(copy, "--data.corpus", "", "--data.paths", f"[{tmp_path}/tiny-400]")
    assert "was trained with tokenizer" in text


def test_resume_with_other_harmless_knobs_says_so(one_rank: RankPool, copy: Path, data_cache: str) -> None:
    """Negative control: a learning rate may change. It is said, and the run goes on."""
    given = ["--run.folder", str(copy), "--data.cache", data_cache, "--run.steps", "3", "--optimizer.lr", "0.001"]
    assert one_rank.run(attempt, given, True)[0] == ("", 0, "")
    events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    assert any("optimizer.lr: 0.003 -> 0.001" in event.get("text", "") for event in events)
    assert len(losses(copy)) == 3


def test_never_resume(refused: Refuse, copy: Path, one_rank: RankPool, data_cache: str, tmp_path: Path) -> None:
    text = refused(copy, "--run.resume", "never", kind="ConfigurationError")
    assert "holds a run already" in text
    shutil.rmtree(copy / "checkpoints")
    assert "holds a run already" in refused(copy, "--run.resume", "never", kind="ConfigurationError")
    fresh = ["--run.folder", str(tmp_path / "new"), "--data.cache", data_cache, "--run.resume", "never"]
    assert one_rank.run(attempt, fresh)[0] == ("", 0, "")


def test_must_resume(refused: Refuse, copy: Path, one_rank: RankPool, data_cache: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no finished checkpoint" in refused(tmp_path / "empty", "--run.resume", "must")
    given = ["--run.folder", str(copy), "--data.cache", data_cache, "--run.resume", "must"]
    assert one_rank.run(attempt, given)[0] == ("", 0, "")


def test_misspelt_folder_is_not_made(refused: Refuse, tmp_path: Path) -> None:
    refused(tmp_path / "mispelt", "--run.resume", "must")
    assert not (tmp_path / "mispelt").exists()


# -- corrupt checkpoints ---------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "bit flipped", "missing"])
@pytest.mark.parametrize("file", ["weight-00000.safetensors", "exp_avg_sq-00000.safetensors"])
def test_damaged_shard(refused: Refuse, copy: Path, file: str, damage: Callable[[Path], None]) -> None:
    newest = copy / "checkpoints" / "step_00000002"
    damage(newest / file)
    text = refused(copy)
    assert str(newest / file) in text
    assert "delete" in text, "how to go on from the checkpoint before"


def test_going_on_without_the_damaged_one(one_rank: RankPool, copy: Path, data_cache: str, trained: Path) -> None:
    """What the message above says works: step 2 is made again, and is the same."""
    shutil.rmtree(copy / "checkpoints" / "step_00000002")
    assert (
        one_rank.run(attempt, ["--run.folder", str(copy), "--data.cache", data_cache, "--run.steps", "2"], True)[0][0]
        == ""
    )
    assert losses(copy) == losses(trained)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 99}', '{"version": 1}', "null"])
def test_damaged_manifest(refused: Refuse, copy: Path, content: str) -> None:
    path = copy / "checkpoints" / "step_00000002" / "checkpoint.json"
    path.write_text(content)
    assert str(path) in refused(copy)


def test_manifest_is_missing(refused: Refuse, copy: Path) -> None:
    (copy / "checkpoints" / "step_00000002" / "checkpoint.json").unlink()
    assert "checkpoint.json is missing" in refused(copy)
