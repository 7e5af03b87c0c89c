"""Changed indices are refused, or mean what they meant: 300 cases in `make test`, 20,000 more in `make test-all`.

Each case goes through `Corpus`, which is what training opens. In half of them the manifest's checksum is made to fit the
change, so that the checks of the numbers themselves have to find it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagamma.data.preparation.verification import HEADER, MAGIC
from megagamma.data.text import Corpus
from megagamma.errors import DataError

SEEN: dict[str, int] = {}

place = st.floats(0, 1, exclude_max=True)
number = st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 255, 2**32])
mutation = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("write"), place, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("int32"), place, number),
    st.tuples(st.just("int64"), place, number),
    st.tuples(st.just("cut"), place, st.integers(1, 64)),
    st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("swap"), place, place),
    st.tuples(st.just("random"), place, st.binary(max_size=200)),
)


def mutate(valid: bytes, change: tuple) -> bytes:
    kind, where, value = change
    data, at = bytearray(valid), int(where * len(valid))
    if kind == "flip":
        data[at] ^= 1 << value
    elif kind == "write":
        data[at : at + len(value)] = value[: len(data) - at]
    elif kind in ("int32", "int64"):
        width = int(kind[3:]) // 8
        # On a number's place in the tables, where there is one.
        at = max(0, min(len(data) - width, HEADER.size + (at - HEADER.size) // width * width))
        data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    elif kind == "cut":
        del data[at : at + value]
    elif kind == "insert":
        data[at:at] = value
    elif kind == "swap":
        first, second = (HEADER.size + int(share * (len(data) - HEADER.size)) // 4 * 4 for share in (where, value))
        data[first : first + 4], data[second : second + 4] = data[second : second + 4], data[first : first + 4]
    else:
        data = bytearray((valid[: HEADER.size] if where < 0.5 else MAGIC) + value)
    return bytes(data)


def replace(path: Path, content: bytes) -> None:
    """By a new file: the old one may be mapped still."""
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)


class Folder:
    def __init__(self, folder: Path) -> None:
        self.index, self.manifest = folder / "train.idx", folder / "manifest.json"
        self.valid, self.described = self.index.read_bytes(), json.loads(self.manifest.read_text())
        self.corpus = Corpus(folder, "train")
        self.lengths = np.array(self.corpus.document_lengths)
        self.tokens = np.array(self.corpus.stream(0, self.corpus.tokens))
        self.folder = folder

    def check(self, changes: list[tuple], fitting_checksum: bool) -> None:
        content = self.valid
        for change in changes:
            content = mutate(content, change) if content else content
        described = json.loads(json.dumps(self.described))
        if fitting_checksum:
            described["files"]["train.idx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        replace(self.index, content)
        replace(self.manifest, json.dumps(described).encode())
        message = ""
        try:
            corpus = Corpus(self.folder, "train")
        except DataError as error:
            message = str(error)
        if message:
            assert str(self.folder) in message and "\n" not in message
            assert content != self.valid, "a valid index was refused"
            SEEN["refused"] = SEEN.get("refused", 0) + 1
            return
        SEEN["opened"] = SEEN.get("opened", 0) + 1
        assert np.array_equal(corpus.document_lengths, self.lengths)
        for document in range(corpus.documents):
            stop = int(self.lengths[: document + 1].sum())
            start = stop - int(self.lengths[document])
            assert np.array_equal(corpus.read(document, 0, stop - start), self.tokens[start:stop])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    from megagamma.data.preparation.prepare import embedded_settings, prepare

    return Folder(prepare(embedded_settings("tiny", str(tmp_path_factory.mktemp("fuzz")))))


def fuzz(folder: Folder, cases: int) -> None:
    SEEN.clear()

    @settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(mutation, max_size=3), st.booleans())
    def run(changes: list[tuple], fitting_checksum: bool) -> None:
        folder.check(changes, fitting_checksum)

    run()
    # Both ends are reached, or the test would show nothing.
    assert SEEN["refused"] > cases / 2 and SEEN["opened"] > 0


def test_a_changed_index_is_refused_or_means_the_same(folder: Folder) -> None:
    fuzz(folder, 300)


@pytest.mark.slow
def test_20000_changed_indices(folder: Folder) -> None:
    fuzz(folder, 20_000)


def test_the_fuzz_notices_a_change_that_passes(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the check of the numbers, a length moved from one document to the next passes.
    monkeypatch.setattr("megagamma.data.preparation.indexing.check_index", lambda *_: None)
    first, second = folder.lengths[:2].tolist()
    lengths = (first + 1).to_bytes(4, "little") + (second - 1).to_bytes(4, "little")
    start = HEADER.size / len(folder.valid) + 1e-9
    with pytest.raises(AssertionError):
        folder.check([("write", start, lengths)], True)
