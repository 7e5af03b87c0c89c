"""Data in training is verified: altered token files and indices are named before a step, a wrong id at its batch."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagamma.config.io import parse_config
from megagamma.data.preparation.indexing import verify_prepared
from megagamma.data.preparation.verification import HEADER
from megagamma.data.sources import open_data
from megagamma.errors import DataError

TINY_DOCUMENTS = 45  # of the train split


@pytest.fixture
def folder(data_cache: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(data_cache) / "tiny", tmp_path / "tiny"))


def opened(folder: Path, *arguments: str) -> Any:
    paths = json.dumps([str(folder)])
    return open_data(
        parse_config(["--config", "configs/smoke.yaml", "--data.corpus", "", "--data.paths", paths, *arguments])
    )


def edit(path: Path, change: Callable[[bytearray], None], fitting_checksum: bool = False) -> None:
    """Change a file at its own size; with a fitting checksum in the manifest, as only intent does."""
    content = bytearray(path.read_bytes())
    size = len(content)
    change(content)
    assert len(content) == size
    path.write_bytes(content)
    if fitting_checksum:
        manifest = json.loads((path.parent / "manifest.json").read_text())
        manifest["files"][path.name]["sha256"] = hashlib.sha256(content).hexdigest()
        (path.parent / "manifest.json").write_text(json.dumps(manifest))


def put(at: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(form, content, at, value)


def flip(at: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[at] ^= 1

    return change


LENGTHS = HEADER.size
POINTERS = LENGTHS + 4 * TINY_DOCUMENTS
INDICES = POINTERS + 8 * TINY_DOCUMENTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(LENGTHS + 4 * 7, "<i", 0), r"document 7 has length 0, which must be 1 or more"),
        (put(LENGTHS + 4 * 7, "<i", -5), r"document 7 has length -5"),
        (
            put(LENGTHS + 4 * 7, "<i", 9),
            r"document 8 has pointer [\d,]+, which must be the bytes of the documents before",
        ),
        (put(POINTERS + 8 * 20, "<q", 4), r"document 20 has pointer 4"),
        (put(INDICES + 8 * 30, "<q", 31), r"document 30 has index 31, which must be its number"),
        (put(INDICES + 8 * TINY_DOCUMENTS, "<q", 44), r"document 45 has index 44"),
        (put(9, "<Q", 2), "is not a Megatron index of version 1"),
        (put(17, "B", 4), "says type 4 and 45 documents"),
    ],
)
def test_a_damaged_index_names_its_document(folder: Path, change: Callable[[bytearray], None], message: str) -> None:
    edit(folder / "train.idx", change, fitting_checksum=True)
    for verify in ("auto", "index", "full"):
        with pytest.raises(DataError, match=rf"train\.idx'.*{message}"):
            opened(folder, "--data.verify", verify)


def test_a_damaged_index_of_the_validation_set(folder: Path) -> None:
    edit(folder / "validation.idx", flip(LENGTHS + 1))
    with pytest.raises(DataError, match=r"validation\.idx'"):
        opened(folder, "--data.verify", "index")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tokens_altered_at_their_own_size(folder: Path, split: str) -> None:
    before = opened(folder)
    assert "checksums of all tokens of 1" in before.checked and "indices of 1" in before.checked
    edit(folder / f"{split}.bin", flip(1000))
    for verify in ("auto", "full"):
        with pytest.raises(
            DataError, match=rf"{split}\.bin' does not have the manifest's sha256.*prepare the folder again"
        ):
            opened(folder, "--data.verify", verify)
    # Without reading the tokens it cannot be known, and the console says what was not read.
    assert "the tokens of 1 are not" in opened(folder, "--data.verify", "index").checked


def test_large_folders_are_not_read_unless_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagamma.data.sources._FULL_BYTES", 1000)
    edit(folder / "train.bin", flip(1000))
    assert "the tokens of 1 are not" in opened(folder).checked
    with pytest.raises(DataError, match="sha256"):
        opened(folder, "--data.verify", "full")


def test_one_process_of_a_host_reads_the_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder / "train.bin", flip(1000))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    opened(folder)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match="sha256"):
        opened(folder)


def test_an_id_beyond_the_vocabulary(folder: Path) -> None:
    vocab_size = verify_prepared(folder)["tokenizer"]["vocab_size"]
    lengths = np.frombuffer((folder / "train.idx").read_bytes(), "<i4", TINY_DOCUMENTS, HEADER.size)
    at = int(lengths[:12].sum()) + 3  # of document 12
    edit(folder / "train.bin", put(2 * at, "<H", vocab_size), fitting_checksum=True)
    named = rf"train\.bin': document 12 has token id {vocab_size}, the vocabulary has 0 to {vocab_size - 1}"
    with pytest.raises(DataError, match=named):
        opened(folder)
    with pytest.raises(DataError, match=named):
        verify_prepared(folder, full=True)
    # Where the start does not read the tokens, the batch that holds it does.
    source = opened(folder, "--data.verify", "index").train
    epoch = range(source.blend.samplers[0].windows_per_epoch)
    with pytest.raises(DataError, match=named + r".*--verify") as raised:
        source.batch(epoch)
    assert raised.value.on_one_rank


def test_an_id_beyond_the_vocabulary_in_the_validation_set(folder: Path) -> None:
    edit(folder / "validation.bin", put(2 * 40, "<H", 60000), fitting_checksum=True)
    (evaluation,) = opened(folder, "--data.verify", "index").validation.values()
    with pytest.raises(DataError, match=r"validation\.bin': document 0 has token id 60000"):
        evaluation.batch(range(evaluation.size))


def test_a_document_without_its_end(folder: Path) -> None:
    lengths = np.frombuffer((folder / "train.idx").read_bytes(), "<i4", TINY_DOCUMENTS, HEADER.size)
    edit(folder / "train.bin", put(2 * (int(lengths[:5].sum()) - 1), "<H", 300), fitting_checksum=True)
    with pytest.raises(DataError, match=r"train\.bin': document 4 does not end with the eos"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["tokenizer"].update(vocab_size=60000),
            r"tokenizer\.vocab_size=60000, its tokenizer\.model has 512",
        ),
        (lambda m: m["tokenizer"].update(eos_id="2"), r"tokenizer\.eos_id must be a whole number"),
        (lambda m: m.pop("splits"), "files and splits must be mappings"),
        (lambda m: m["splits"].update(train=[1]), r"splits\.train must have documents and tokens"),
        (lambda m: m["splits"]["train"].update(documents=-1), r"splits\.train must have documents and tokens"),
        (lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": ""}}), "files must be train.bin"),
        (lambda m: m["files"].update({"train.bin": 3}), r"files\.train\.bin must have bytes"),
        (lambda m: m.update(dtype="float32"), "dtype=float32 must be uint16 or int32"),
        (lambda m: m.update(dtype="int32"), "the manifest at [0-9,]+:"),
    ],
)
def test_a_manifest_of_other_content(folder: Path, change: Callable[[dict], Any], message: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        opened(folder)


def test_a_manifest_nested_too_deep(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"manifest\.json' cannot be read"):
        verify_prepared(folder)
