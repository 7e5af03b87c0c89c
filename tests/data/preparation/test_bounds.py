"""Archives that grow, lines without an end, nesting, pipes: named and stopped, within bounds that options raise."""

from __future__ import annotations

import gzip
import json
import os
import resource
import sys
from pathlib import Path

import pytest
import zstandard

from megagamma.commands.prepare_data import build_parser, main, settings_from
from megagamma.data.preparation import archives
from megagamma.data.preparation.corpus import list_shards, read_documents
from megagamma.data.preparation.source import Source
from megagamma.errors import ConfigurationError, DataError

MIB = 1 << 20


def documents(path: Path, **options: object) -> list[str]:
    source = Source(inputs=(str(path),), **options)  # type: ignore[arg-type]
    return [text for shard in list_shards(source) for text in read_documents(shard, source)]


LINE = b'{"text": "' + b"a" * 1000 + b'"}\n'


def bomb(path: Path, size: int, line: bytes = LINE) -> Path:
    """A zst archive of some kilobytes behind which stand `size` bytes of equal lines."""
    block = line * (MIB // len(line))
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    with open(path, "wb") as file:
        for _ in range(size // len(block) + 1):
            file.write(compressor.compress(block))
        file.write(compressor.flush())
    return path


def test_an_archive_that_grows_beyond_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_RATIO_FROM", 4 * MIB)
    path = bomb(tmp_path / "bomb.jsonl.zst", 16 * MIB)
    assert path.stat().st_size < 40_000
    with pytest.raises(DataError, match=r"bomb\.jsonl\.zst' has [\d,]+ bytes and gave [\d,]+ so far.*--max_ratio"):
        documents(path)
    assert len(documents(path, max_ratio=1e6)) > 16_000
    # Below the size from which it is looked at, no ratio is too high.
    monkeypatch.setattr(archives, "_RATIO_FROM", 64 * MIB)
    assert len(documents(path)) > 16_000


def test_an_archive_is_read_in_bounded_memory(tmp_path: Path) -> None:
    # 512 MiB of zeros in one frame of some 20 KB: as one line, too long for what is asked.
    path = bomb(tmp_path / "zeros.jsonl.zst", 512 * MIB, b"\0" * 1024)
    assert path.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"line 1 is longer than max_document_megabytes=8: .*--max_document_megabytes"):
        documents(path, max_document_bytes=8 * MIB)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200 * MIB


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"b" * 3000 + b'"}\n', {}, "line 2 is longer than"),
        ("a.txt", b"c" * 3000, {}, r"a\.txt' is longer than"),
        (
            "a.txt",
            b"c" * 500 + b"\n\n" + b"c" * 3000,
            {"document_separator": "blank-line"},
            "the document at byte 502 is",
        ),
        ("a.json", json.dumps(["d" * 3000]).encode(), {}, r"a\.json' is longer than"),
        ("a.jsonl.gz", gzip.compress(b"e" * 3000, mtime=0), {}, "line 1 is longer than"),
    ],
)
def test_a_document_that_is_too_long(
    tmp_path: Path, name: str, content: bytes, options: dict[str, str], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / name, max_document_bytes=2000, **options)
    if name != "a.jsonl.gz":
        assert max(map(len, documents(tmp_path / name, max_document_bytes=4000, **options))) == 3000


def test_a_cell_of_parquet_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["f" * 3000] * 2000}), path)
    with pytest.raises(DataError, match="a cell is longer than"):
        documents(path, max_document_bytes=2000)
    monkeypatch.setattr(archives, "_RATIO_FROM", MIB)
    with pytest.raises(DataError, match="--max_ratio"):
        documents(path)
    assert len(documents(path, max_ratio=1e6)) == 2000


def test_json_that_cannot_be_held(tmp_path: Path) -> None:
    deep, digits = "[" * 200_000, '{"text": "a", "n": ' + "7" * 5000 + "}"
    for name in ("a.jsonl", "a.json"):
        for text, message in ((deep, "nested too deep"), (digits, "cannot be held")):
            (tmp_path / name).write_text(text)
            with pytest.raises(DataError, match=rf"{name}'.*{message}"):
                documents(tmp_path / name)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    for entry in (tmp_path, tmp_path / "b.txt", tmp_path / "*.txt"):
        with pytest.raises(DataError, match=r"b\.txt' is a pipe, socket or device: give regular files"):
            documents(entry)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "c.txt").symlink_to("c.txt")
    with pytest.raises(DataError, match=r"c\.txt' cannot be read"):
        documents(tmp_path)
    (tmp_path / "c.txt").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert documents(tmp_path) == ["text"]
    assert documents(tmp_path / "**" / "*.txt") == ["text"]
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(DataError, match="links lead back to its folders"):
        documents(tmp_path / "**" / "*.txt")


def test_options_raise_the_bounds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n" * 200_000)
    command = [
        "--input",
        str(tmp_path / "a.txt"),
        "--output",
        str(tmp_path / "out"),
        "--vocab_size",
        "280",
        "--workers",
        "1",
    ]
    with pytest.raises(DataError, match="longer than max_document_megabytes=1:"):
        main([*command, "--max_document_megabytes", "1"])
    assert not (tmp_path / "out").exists()
    assert main([*command, "--max_document_megabytes", "4", "--sample_characters", "10000"]) == 0
    source = settings_from(build_parser().parse_args([*command, "--max_ratio", "7"])).source
    assert (source.max_document_bytes, source.max_ratio) == (1 << 30, 7)
    with pytest.raises(ConfigurationError, match="--max_ratio 0 must be above 0"):
        settings_from(build_parser().parse_args([*command, "--max_ratio", "0"]))
    assert sys.getrecursionlimit() < 200_000
