"""Readers behind `corpus.read_documents`: .txt, .jsonl, .json, .parquet and Hugging Face data sets."""

from __future__ import annotations

import codecs
import functools
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from megagamma.data.preparation.archives import Growth, damage, open_bounded
from megagamma.data.preparation.source import EmptyFileError, Shard, Source
from megagamma.errors import DataError

_BLOCK = 1 << 20
_BLANK_LINES = re.compile(rb"(?:\r?\n[ \t]*){2,}(?:\r?\n)?")


def _too_long(place: str, source: Source) -> DataError:
    return DataError(
        f"{place} is longer than max_document_megabytes={source.max_document_bytes / 2**20:g}: cut it, or raise "
        "--max_document_megabytes"
    )


def _read_whole(stream: IO[bytes], path: str, source: Source) -> bytes:
    """All of a file that is one document."""
    blocks, size = [], 0
    while block := stream.read(_BLOCK):
        size += len(block)
        if size > source.max_document_bytes:
            raise _too_long(f"inputs: '{path}'", source)
        blocks.append(block)
    return b"".join(blocks)


def read_file(shard: Shard, source: Source) -> Iterator[str]:
    """Yield the documents of a file shard; a failed read becomes a DataError that names the file."""
    readers = {"txt": _read_text, "jsonl": _read_json_lines, "json": _read_json, "parquet": _read_parquet}
    try:
        yield from readers[shard.format](shard, source)
    except MemoryError as error:
        raise DataError(
            f"inputs: '{shard.path}' has a document that does not fit in memory: cut it, or lower "
            "--max_document_megabytes to have it named"
        ) from error
    except damage() as error:
        raise DataError(
            f"inputs: '{shard.path}' is truncated or not {shard.compression} data ({error}): fetch or compress it again"
        ) from error
    except OSError as error:
        # bz2 reports corruption as a bare OSError without an errno.
        reason = error.strerror or f"truncated or not {shard.compression} data ({error})"
        raise DataError(f"inputs: '{shard.path}' cannot be read: {reason}: check or fetch it again") from error


def _decode(data: bytes, path: str, offset: int) -> str:
    """UTF-8 text of `data`, which starts at byte `offset` of the (decompressed) file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"inputs: '{path}' is not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}): "
            "convert it, for instance with iconv -f LATIN1 -t UTF-8"
        ) from error


def _check_text(value: Any, source: Source, place: str) -> str:
    """The text of a record, or a DataError that says where and what is wrong with it."""
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field '{source.text_field}' is {type(value).__name__}, not text: choose another --text_field"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the text has an unpaired surrogate ({value[error.start]!a}) at "
            f"character {error.start}, "
            "which UTF-8 cannot hold: remove it from the source"
        ) from error
    return value


def _text_of(record: Any, source: Source, place: str) -> str:
    if isinstance(record, str):
        return _check_text(record, source, place)
    if not isinstance(record, dict):
        raise DataError(
            f"{place}: a {type(record).__name__} where an object with field '{source.text_field}' is expected"
        )
    if source.text_field not in record:
        raise DataError(
            f"{place}: no field '{source.text_field}': choose --text_field from {', '.join(map(str, record)) or 'none'}"
        )
    return _check_text(record[source.text_field], source, place)


def _read_text(shard: Shard, source: Source) -> Iterator[str]:
    with open_bounded(shard, source) as stream:
        offset = 0
        separator = source.document_separator
        if separator is None:
            data = _read_whole(stream, shard.path, source)
            if data.startswith(codecs.BOM_UTF8):
                data, offset = data[3:], 3
            yield _decode(data, shard.path, offset)
            return
        blank = separator == "blank-line"
        pattern = _BLANK_LINES if blank else re.compile(re.escape(separator.encode()))
        pending = stream.read(_BLOCK)
        if pending.startswith(codecs.BOM_UTF8):
            pending, offset = pending[3:], 3
        while True:
            # As much again as is pending, so that a long document is not searched again for each block of it.
            block = stream.read(max(_BLOCK, len(pending)))
            done = 0
            for match in pattern.finditer(pending):
                # A run of blank lines that touches the end of what is read may continue in the next block.
                if match.end() == len(pending) and block:
                    break
                yield from _between(pending[done : match.start()], shard.path, offset + done, blank)
                done = match.end()
            pending, offset = pending[done:], offset + done
            if len(pending) > source.max_document_bytes:
                raise _too_long(f"inputs: '{shard.path}': the document at byte {offset}", source)
            if not block:
                break
            pending += block
        yield from _between(pending, shard.path, offset, blank)


def _between(data: bytes, path: str, offset: int, blank: bool) -> Iterator[str]:
    """What stands between two separators, if anything does."""
    if data.strip() if blank else data:
        yield _decode(data, path, offset)


def _read_json_lines(shard: Shard, source: Source) -> Iterator[str]:
    with open_bounded(shard, source) as stream:
        offset = shard.start
        if offset:
            # A line belongs to the range in which it starts: step back one byte, so that a line which
            # starts exactly at `start` is kept, and drop the rest of the line before.
            stream.seek(offset - 1)
            offset -= 1
            while rest := stream.readline(_BLOCK):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
        number = 0
        while shard.stop is None or offset < shard.stop:
            line = stream.readline(source.max_document_bytes + 1)
            if not line:
                return
            number += 1
            if len(line) > source.max_document_bytes:
                raise _too_long(_line(shard, number), source)
            content = line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
            text = _decode(content, shard.path, offset + len(line) - len(content))
            if text.strip():
                try:
                    document = _text_of(json.loads(text), source, "")
                except json.JSONDecodeError as error:
                    problem = f" is not JSON ({error.msg} at column {error.colno}): fix or remove the line"
                    raise DataError(_line(shard, number) + problem) from error
                except (RecursionError, ValueError) as error:
                    raise DataError(f"{_line(shard, number)} {_unreadable_json(error)}: remove the line") from error
                except DataError as error:
                    raise DataError(f"{_line(shard, number)}{error}") from error
                yield document
            offset += len(line)


def _line(shard: Shard, number: int) -> str:
    """Name line `number` of a range by its number in the file; counted only for an error message."""
    if shard.start:
        with open(shard.path, "rb") as stream:
            left = shard.start - 1
            while block := stream.read(min(left, _BLOCK)):
                number += block.count(b"\n")
                left -= len(block)
        number += 1
    return f"inputs: '{shard.path}' line {number}"


def _unreadable_json(error: Exception) -> str:
    """Why Python's parser refuses what may be JSON."""
    if isinstance(error, RecursionError):
        return "is JSON that is nested too deep"
    return f"is JSON that cannot be held ({str(error).split(';')[0]})"


def _read_json(shard: Shard, source: Source) -> Iterator[str]:
    with open_bounded(shard, source) as stream:
        text = _decode(_read_whole(stream, shard.path, source).removeprefix(codecs.BOM_UTF8), shard.path, 0)
    place = f"inputs: '{shard.path}'"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place} line {error.lineno} is not JSON ({error.msg} at column {error.colno}): fix the file"
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{place} {_unreadable_json(error)}: fix the file") from error
    if isinstance(value, dict):
        # Either columns, {"text": [...], ...}, or records under one name, {"data": [{...}, ...]}.
        columns = value.get(source.text_field)
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        if isinstance(columns, list):
            value = columns
        elif len(lists) == 1 and lists[0] and isinstance(lists[0][0], dict):
            value = lists[0]
        else:
            raise DataError(
                f"{place}: no list under '{source.text_field}': choose --text_field from {', '.join(value) or 'none'}"
            )
    if not isinstance(value, list):
        raise DataError(f"{place} holds a {type(value).__name__}: give a list of records, or an object of lists")
    for index, record in enumerate(value):
        yield _text_of(record, source, f"{place} record {index}")


def _open_parquet(path: str, shard: Shard | None = None, source: Source | None = None) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        if shard and source and shard.compression:
            with open_bounded(shard, source) as stream:
                return pyarrow.parquet.ParquetFile(io.BytesIO(_read_whole(stream, path, source)))
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"inputs: '{path}' is not a readable parquet file ({error}): fetch or write it again"
        ) from error


def parquet_row_groups(path: str) -> list[int]:
    """Uncompressed bytes of each row group of a parquet file; a file without rows is refused as empty."""
    metadata = _open_parquet(path).metadata
    if metadata.num_rows == 0:
        raise EmptyFileError(f"inputs: '{path}' has no rows: remove it or give a file with text")
    return [max(1, metadata.row_group(index).total_byte_size) for index in range(metadata.num_row_groups)]


def _read_parquet(shard: Shard, source: Source) -> Iterator[str]:
    import pyarrow

    file, growth = _open_parquet(shard.path, shard, source), Growth(shard.path, source)
    names = file.schema_arrow.names
    place = f"inputs: '{shard.path}'"
    if source.text_field not in names:
        raise DataError(f"{place}: no column '{source.text_field}': choose --text_field from {', '.join(names)}")
    groups = range(shard.start, file.num_row_groups if shard.stop is None else shard.stop)
    try:
        for batch in file.iter_batches(batch_size=256, row_groups=list(groups), columns=[source.text_field]):
            for value in batch.column(0).to_pylist():
                where = f"{place} row groups {groups.start} to {groups.stop - 1}"
                text = _check_text(value, source, where)
                if len(text) > source.max_document_bytes:
                    raise _too_long(f"{where}: a cell", source)
                growth.add(len(text))
                yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{place} is corrupt ({error}): fetch or write it again") from error


@functools.lru_cache(maxsize=2)
def _load(name: str | None, config: str | None, split: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the hub raises a dozen unrelated types; every one means: not readable as asked
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"hf_dataset: '{name}' (config {config}, split '{split}') cannot be loaded: "
            f"{reason}: check the name, "
            "--hf_config, --hf_split and the network, or download it and give its files with --input"
        ) from error


def huggingface_shards(source: Source, shard_bytes: int) -> list[Shard]:
    """Cut a Hugging Face data set at rows, or a stream at its own shards."""
    dataset = _load(source.hf_dataset, source.hf_config, source.hf_split, source.streaming)
    name = f"{source.hf_dataset}/{source.hf_config or ''}/{source.hf_split}"
    columns = dataset.column_names
    if columns is not None and source.text_field not in columns:
        raise DataError(
            f"hf_dataset: '{name}' has no field '{source.text_field}': choose --text_field from {', '.join(columns)}"
        )
    if source.streaming:
        identity = f"{name}|stream"
        return [
            Shard("huggingface", name, shard_bytes, identity, start=k, stop=k + 1) for k in range(dataset.num_shards)
        ]
    if len(dataset) == 0:
        raise DataError(f"hf_dataset: '{name}' has no rows: choose another --hf_split")
    row_bytes = max(1.0, dataset.data.nbytes / len(dataset))
    step = max(1, int(shard_bytes / row_bytes))
    identity = f"{name}|{dataset._fingerprint}"
    shards = []
    for start in range(0, len(dataset), step):
        stop = min(start + step, len(dataset))
        size = int((stop - start) * row_bytes)
        shards.append(Shard("huggingface", name, size, identity, start=start, stop=stop))
    return shards


def read_huggingface(shard: Shard, source: Source) -> Iterator[str]:
    """Yield the documents of one range of rows, or of one shard of a stream."""
    dataset = _load(source.hf_dataset, source.hf_config, source.hf_split, source.streaming)
    if source.streaming:
        rows = dataset.shard(dataset.num_shards, shard.start)
    else:
        rows = dataset.select(range(shard.start, len(dataset) if shard.stop is None else shard.stop))
    for index, row in enumerate(rows):
        yield _text_of(row, source, f"hf_dataset: '{shard.path}' row {shard.start + index}")
