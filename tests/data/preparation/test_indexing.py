"""The split depends on a document's text alone; damage to a prepared folder is always noticed and named."""

import shutil

import numpy as np
import pytest

from megagamma.data.preparation.indexing import assign_documents, verify_prepared
from megagamma.data.preparation.prepare import embedded_settings, prepare
from megagamma.errors import DataError


@pytest.fixture
def tiny(tmp_path):
    return prepare(embedded_settings("tiny", str(tmp_path)))


def records(count, start=0):
    generator = np.random.default_rng(5)
    table = np.zeros(count, dtype=[("low", "<u8"), ("high", "<u8")])
    table["low"], table["high"] = generator.integers(0, 2**63, size=(2, count))
    return table[start:]


def test_the_split_is_stable_uniform_and_follows_the_salt():
    table = records(20_000)
    side, _ = assign_documents(table, 0.1, "salt", False)
    assert abs(side.mean() - 0.1) < 0.01
    fewer, _ = assign_documents(table[::3], 0.1, "salt", False)
    assert (fewer == side[::3]).all(), "a document keeps its side when others come and go"
    more, _ = assign_documents(table, 0.2, "salt", False)
    assert (more[side == 1] == 1).all(), "a larger fraction only adds to validation"
    other, _ = assign_documents(table, 0.1, "pepper", False)
    assert 0.1 < (other[side == 1] == 1).mean() + 0.05 < 0.2
    assert not assign_documents(table, 0.0, "salt", False)[0].any()


def test_each_side_gets_a_document_when_there_are_two():
    for fraction in (1e-9, 0.5, 0.999999):
        for count in (2, 3, 10):
            side, _ = assign_documents(records(count), fraction, "salt", False)
            assert 0 < side.sum() < count
    assert not assign_documents(records(1), 0.5, "salt", False)[0].any()
    twice = np.concatenate([records(1), records(1)])
    assert not assign_documents(twice, 0.5, "salt", False)[0].any(), "equal texts stay together"


def test_verify_notices_damage(tiny, tmp_path):
    def corrupt(name, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tiny, copy)
        data = bytearray((copy / name).read_bytes())
        (copy / name).write_bytes(change(data))
        return copy

    def flip(data, place=1000):
        data[place] ^= 1
        return data

    with pytest.raises(
        DataError, match=r"train.bin' is truncated: [\d,]+ bytes, the manifest says [\d,]+: .*--overwrite"
    ):
        verify_prepared(corrupt("train.bin", lambda data: data[:-1]))
    with pytest.raises(DataError, match=r"train.idx' is too long"):
        verify_prepared(corrupt("train.idx", lambda data: data + b"x"))
    flipped = corrupt("validation.bin", flip)
    verify_prepared(flipped)
    with pytest.raises(DataError, match=r"validation.bin' does not have the manifest's sha256"):
        verify_prepared(flipped, full=True)
    with pytest.raises(DataError, match="is not a Megatron index"):
        verify_prepared(corrupt("train.idx", lambda data: flip(data, 0)))
    with pytest.raises(DataError, match=r"says type 8 and 44 documents, the manifest says uint16 .type 8. and 45"):
        verify_prepared(corrupt("train.idx", lambda data: flip(data, 18)))
    last_length = 34 + 45 * 4 - 4
    with pytest.raises(DataError, match=r"train.bin' has [\d,]+ bytes, its .idx ends at"):
        verify_prepared(corrupt("train.idx", lambda data: flip(data, last_length)))
    with pytest.raises(DataError, match=r"tokenizer.model' has fingerprint .* the tokens were made with"):
        verify_prepared(corrupt("tokenizer.model", flip))
    with pytest.raises(DataError, match=r"manifest.json' cannot be read"):
        verify_prepared(corrupt("manifest.json", lambda data: data[:-9]))
    with pytest.raises(DataError, match="is not a manifest of prepared text"):
        verify_prepared(corrupt("manifest.json", lambda data: b"{}"))
    with pytest.raises(DataError, match="has format version 9, this program reads 1"):
        verify_prepared(corrupt("manifest.json", lambda data: data.replace(b'version": 1', b'version": 9')))
    copy = corrupt("train.bin", bytes)
    (copy / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train.idx' is missing"):
        verify_prepared(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest.json, so it is not a prepared folder"):
        verify_prepared(copy)
    with pytest.raises(DataError, match=r"folder .*nowhere' does not exist: prepare it with"):
        verify_prepared(tmp_path / "nowhere")
