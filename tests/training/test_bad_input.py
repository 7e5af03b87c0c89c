"""Data and shapes that cannot work end in one clear error, before training, and leave the data as it was."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import attempt, finish, snapshot, start
from support.ranks import RankPool

from megagamma.data.preparation.indexing import read_manifest
from megagamma.data.preparation.prepare import PrepareSettings, prepare
from megagamma.data.preparation.source import Source


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of the same text with another tokenizer, of 400 pieces in place of 512."""
    folder = tmp_path_factory.mktemp("other") / "other"
    return prepare(PrepareSettings(str(folder), Source(corpus="tiny"), vocab_size=400))


@pytest.fixture
def folder(tmp_path: Path, data_cache: str) -> Path:
    """A copy of the prepared corpus, to be corrupt."""
    shutil.copytree(Path(data_cache) / "tiny", tmp_path / "corpus")
    return tmp_path / "corpus"


def on(*folders: Path | str) -> list[str]:
    return ["--data.corpus", "", "--data.paths", "[" + ", ".join(map(str, folders)) + "]"]


def refused(pool: RankPool, run: Path, arguments: list[str], kind: str = "DataError") -> str:
    """The one-line text of the expected error; nothing of a run may have begun."""
    run.mkdir(exist_ok=True)
    (run / "mine.txt").write_text("was here before")
    before = snapshot(run)
    found, code, text = pool.run(attempt, ["--run.folder", str(run), *arguments])[0]
    assert (found, code) == (kind, 2), text
    assert "\n" not in text
    assert snapshot(run) == before
    return text


def change_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# -- token files -----------------------------------------------------------------------------------------------


def test_good_folder_is_accepted(one_rank: RankPool, tmp_path: Path, folder: Path) -> None:
    """Negative control of all tests below: the undamaged copy."""
    assert one_rank.run(attempt, ["--run.folder", str(tmp_path / "run"), *on(folder)])[0] == ("", 0, "")


def test_missing_folder(one_rank: RankPool, tmp_path: Path) -> None:
    text = refused(one_rank, tmp_path / "run", on(tmp_path / "nowhere"))
    assert "nowhere' does not exist: prepare it with tools/prepare_data.py" in text


def test_folder_that_was_not_prepared(one_rank: RankPool, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello")
    assert "has no manifest.json" in refused(one_rank, tmp_path / "run", on(tmp_path / "text"))


def test_empty_text_and_empty_files(one_rank: RankPool, tmp_path: Path, folder: Path) -> None:
    for name in ("train.bin", "train.idx"):
        (folder / name).write_bytes(b"")
    assert "train.bin' is truncated: 0 bytes" in refused(one_rank, tmp_path / "run", on(folder))


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "tokenizer.model", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_file_is_named(one_rank: RankPool, tmp_path: Path, folder: Path, name: str, damage: str) -> None:
    path = folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7])
    before = snapshot(folder)
    text = refused(one_rank, tmp_path / "run", on(folder))
    assert name in text
    assert ":" in text.split(name, 1)[1], "what is wrong follows, and what to do"
    assert snapshot(folder) == before


def test_index_of_another_corpus(one_rank: RankPool, tmp_path: Path, folder: Path, other: Path) -> None:
    shutil.copy(other / "train.idx", folder / "train.idx")
    shutil.copy(other / "validation.idx", folder / "validation.idx")
    # The same documents, so that only their lengths in tokens tell the two apart.
    assert (other / "train.idx").stat().st_size == read_manifest(folder)["files"]["train.idx"]["bytes"]
    text = refused(one_rank, tmp_path / "run", on(folder))
    assert "train.bin' has " in text
    assert "its .idx ends at" in text


def test_tokens_of_another_corpus(one_rank: RankPool, tmp_path: Path, folder: Path, other: Path) -> None:
    shutil.copy(other / "train.bin", folder / "train.bin")
    text = refused(one_rank, tmp_path / "run", on(folder))
    assert "train.bin' is too long" in text
    assert "the manifest says" in text


def test_manifest_of_another_count(one_rank: RankPool, tmp_path: Path, folder: Path) -> None:
    change_manifest(folder, lambda manifest: manifest["splits"]["train"].update(tokens=5))
    assert "the manifest at 10:" in refused(one_rank, tmp_path / "run", on(folder))


def test_manifest_of_another_program(one_rank: RankPool, tmp_path: Path, folder: Path) -> None:
    change_manifest(folder, lambda manifest: manifest.update(format_version=99))
    assert "format version 99" in refused(one_rank, tmp_path / "run", on(folder))
    (folder / "manifest.json").write_text("{}")
    assert "is not a manifest of prepared text" in refused(one_rank, tmp_path / "run", on(folder))


def ours(err: str) -> list[str]:
    """Lines of standard error, without what a CUDA build of torch logs on a machine that has none."""
    return [line for line in err.splitlines() if "No CUDA runtime is found" not in line]


@pytest.mark.launcher
def test_command_line_says_it_in_one_line(tmp_path: Path, folder: Path) -> None:
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])
    code, out, err = finish(start(["--run.folder", str(tmp_path / "run"), *on(folder)]))
    assert (code, out) == (2, "")
    (said,) = ours(err)
    assert said.startswith("error: data: '")
    assert "train.bin' is truncated" in said


# -- tokenizers ------------------------------------------------------------------------------------------------


def test_tokenizer_exchanged(one_rank: RankPool, tmp_path: Path, folder: Path, other: Path) -> None:
    shutil.copy(other / "tokenizer.model", folder / "tokenizer.model")
    text = refused(one_rank, tmp_path / "run", on(folder))
    assert "tokenizer.model' has fingerprint" in text
    assert "put the right tokenizer back" in text


def test_other_tokenizer_asked_for(one_rank: RankPool, tmp_path: Path, folder: Path, other: Path) -> None:
    path = str(other / "tokenizer.model")
    text = refused(one_rank, tmp_path / "run", [*on(folder), "--tokenizer.path", path])
    assert f"tokenizer.path={path}" in text
    assert "give the tokenizer that the data was prepared with, or none" in text
    same = [*on(folder), "--tokenizer.path", str(folder / "tokenizer.model")]
    assert one_rank.run(attempt, ["--run.folder", str(tmp_path / "run"), *same])[0][0] == ""


def test_tokenizer_that_is_none(one_rank: RankPool, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "x.model").write_text("hello")
    text = refused(one_rank, tmp_path / "run", [*on(folder), "--tokenizer.path", str(tmp_path / "x.model")])
    assert "is not a SentencePiece model" in text


def test_two_folders_of_two_tokenizers(one_rank: RankPool, tmp_path: Path, folder: Path, other: Path) -> None:
    text = refused(one_rank, tmp_path / "run", on(folder, other))
    assert "other was written with tokenizer" in text
    assert "prepare them with one tokenizer" in text


def test_validation_set_of_another_tokenizer(one_rank: RankPool, tmp_path: Path, folder: Path, other: Path) -> None:
    text = refused(one_rank, tmp_path / "run", [*on(folder), "--validation.paths", f"{{held: {other}}}"])
    assert f"validation.paths: held={other}" in text
    missing = refused(one_rank, tmp_path / "run", [*on(folder), "--validation.paths", "{held: /nowhere}"])
    assert "/nowhere" in missing


def test_vocabulary_that_does_not_fit(one_rank: RankPool, tmp_path: Path, folder: Path) -> None:
    text = refused(one_rank, tmp_path / "run", [*on(folder), "--model.vocab_size", "511"], "ConfigurationError")
    assert "model.vocab_size=511 is smaller than the tokenizer's 512" in text
    larger = [*on(folder), "--model.vocab_size", "600", "--run.folder", str(tmp_path / "run")]
    assert one_rank.run(attempt, larger)[0] == ("", 0, "")


# -- sizes -----------------------------------------------------------------------------------------------------


def test_windows_longer_than_the_text(one_rank: RankPool, tmp_path: Path, folder: Path) -> None:
    tokens = read_manifest(folder)["splits"]["train"]["tokens"]
    text = refused(one_rank, tmp_path / "run", [*on(folder), "--data.sequence_length", str(tokens)])
    assert f"has {tokens:,} tokens" in text
    assert f"use data.sequence_length <= {tokens - 1}" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.num_attention_heads", "3"], "must divide model.hidden_size=64"),
        (["--model.num_query_groups", "3"], "must divide model.num_attention_heads=4"),
        (["--data.micro_batch_size", "3"], "data.global_batch_size=8 must be a multiple of"),
    ],
)
def test_division_that_leaves_a_rest(one_rank: RankPool, tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in refused(one_rank, tmp_path / "run", arguments, "ConfigurationError")


# -- the rendezvous --------------------------------------------------------------------------------------------


@pytest.mark.launcher
def test_port_in_use(tmp_path: Path, data_cache: str) -> None:
    run = tmp_path / "run"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        begin = time.monotonic()
        code, out, err = finish(start(["--run.folder", str(run), "--data.cache", data_cache], **launcher))
    assert (code, out) == (2, "")
    (said,) = ours(err)
    assert said.startswith(
        f"error: MASTER_PORT={port}: another program listens on 127.0.0.1:{port}: choose a free port"
    )
    assert time.monotonic() - begin < 100, "imports included; not the run's timeout of 30 minutes"
    assert not run.exists()
