"""Token files: parts joined into Megatron's .bin and .idx, described by a manifest, and verified.

A prepared folder holds `train.bin`, `train.idx`, `validation.bin`, `validation.idx`, `tokenizer.model` and
`manifest.json`. A .bin file is the tokens of all documents one after the other (uint16 below 65,500 pieces,
else int32), each document closed by one eos token; its .idx is Megatron's index with one sequence
per document.

Nothing here imports megatron: workers start in a fraction of a second, and the tests hold the files against
Megatron's own writer and reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from megagamma.data.preparation.manifest import FORMAT as FORMAT
from megagamma.data.preparation.manifest import FORMAT_VERSION as FORMAT_VERSION
from megagamma.data.preparation.manifest import read_manifest as read_manifest
from megagamma.data.preparation.verification import (
    DTYPE_CODES,
    FIX,
    HEADER,
    MAGIC,
    SPLITS,
    check_index,
    check_tokens,
)
from megagamma.errors import DataError
from megagamma.files import advice

if TYPE_CHECKING:
    from megagamma.data.preparation.parts import PartTask


DOCUMENT_RECORD = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("low", "<u8"), ("high", "<u8")])
_COPY_TOKENS = 1 << 23


def token_dtype(vocab_size: int) -> str:
    """Megatron's choice of type for token ids: "uint16" below 65,500 pieces, else "int32"."""
    return "uint16" if vocab_size < 65500 else "int32"


@contextlib.contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Turn an OSError while writing below `folder` into a DataError with advice."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"output: '{folder}' cannot be written ({error.strerror or error}): {advice(error)}; "
            "what was prepared before is untouched, and the same command continues from the finished parts"
        ) from error


def _mix(values: np.ndarray, salt: str) -> np.ndarray:
    """uint64 -> uint64: splitmix64 of (value xor salt), uniform, in another order for another salt."""
    key = int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        z = (values ^ np.uint64(key)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def assign_documents(records: np.ndarray, fraction: float, salt: str, drop_duplicates: bool) -> tuple[np.ndarray, int]:
    """Decide for every document: 0 train, 1 validation, -1 dropped.

    A document goes to validation when the hash of its text, mixed with `salt`, falls below `fraction` of
    the range. So its side depends on its text alone: it stays when documents are added, and equal texts are
    on one side. Should that leave a side empty although there are two different texts and fraction > 0, the
    text with the smallest mixed hash moves to validation, or the one with the largest to train.

    Args:
        records: [documents] with uint64 fields "low" and "high", the hash of each text.

    Returns:
        int8 [documents], and the number of duplicates dropped (the first of equal texts is kept).
    """
    side = np.zeros(len(records), dtype=np.int8)
    mixed = _mix(records["low"], salt)
    if fraction > 0 and len(records):
        side[mixed < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))] = 1
        if mixed.min() != mixed.max():
            if not side.any():
                side[mixed == mixed.min()] = 1
            elif side.all():
                side[mixed == mixed.max()] = 0
        else:
            side[:] = 0
    dropped = 0
    if drop_duplicates and len(records):
        order = np.lexsort((records["low"], records["high"]))  # stable: equal texts stay in source order
        ordered = records[order]
        repeated = (ordered["low"][1:] == ordered["low"][:-1]) & (ordered["high"][1:] == ordered["high"][:-1])
        side[order[1:][repeated]] = -1
        dropped = int(repeated.sum())
    return side, dropped


def merge_parts(tasks: list[PartTask], folder: Path, fraction: float, salt: str, drop_duplicates: bool) -> dict:
    """Join finished parts, in order, into the token files of a prepared folder.

    Holds some 60 bytes per document in memory.

    Returns:
        "splits": {split: {documents, tokens, bytes}}, "files": {name: {bytes, sha256}},
        "duplicates_dropped".
    """
    tables = [np.fromfile(task.path("documents"), dtype=DOCUMENT_RECORD) for task in tasks]
    side, dropped = assign_documents(np.concatenate(tables), fraction, salt, drop_duplicates)
    dtype = tasks[0].dtype
    writers = {k: _SplitWriter(folder, split, dtype) for k, split in enumerate(SPLITS) if (side == k).any()}
    try:
        first = 0
        for task, table in zip(tasks, tables, strict=True):
            mine = side[first : first + len(table)]
            first += len(table)
            if len(table) == 0:
                continue
            tokens = np.memmap(task.path("tokens"), dtype=dtype, mode="r")
            ends = np.concatenate([[0], np.cumsum(table["tokens"])])
            edges = [0, *(np.flatnonzero(np.diff(mine)) + 1), len(mine)]
            for start, stop in itertools.pairwise(edges):
                if mine[start] >= 0:
                    writers[mine[start]].write(tokens[ends[start] : ends[stop]], table[start:stop])
        splits: dict[str, dict] = {}
        files: dict[str, dict] = {}
        for writer in writers.values():
            splits[writer.split] = writer.close(files)
    finally:
        for writer in writers.values():
            writer.file.close()
    return {"splits": splits, "files": files, "duplicates_dropped": dropped}


class _SplitWriter:
    """Appends documents to one split's .bin, then writes its .idx; keeps counts and checksums."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.split, self.dtype, self.folder = split, dtype, folder
        self.file = open(folder / f"{split}.bin", "wb")  # noqa: SIM115 (closed by merge_parts)
        self.hash = hashlib.sha256()
        self.lengths: list[np.ndarray] = []
        self.bytes = 0

    def write(self, tokens: np.ndarray, table: np.ndarray) -> None:
        for start in range(0, len(tokens), _COPY_TOKENS):
            block = tokens[start : start + _COPY_TOKENS].tobytes()
            self.file.write(block)
            self.hash.update(block)
        self.lengths.append(table["tokens"].copy())
        self.bytes += int(table["bytes"].sum())

    def close(self, files: dict) -> dict:
        _sync(self.file)
        lengths = np.concatenate(self.lengths)
        tokens = int(lengths.sum())
        index = index_bytes(lengths, self.dtype)
        with open(self.folder / f"{self.split}.idx", "wb") as file:
            file.write(index)
            _sync(file)
        size = tokens * np.dtype(self.dtype).itemsize
        files[f"{self.split}.bin"] = {"bytes": size, "sha256": self.hash.hexdigest()}
        files[f"{self.split}.idx"] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
        return {"documents": len(lengths), "tokens": tokens, "bytes": self.bytes}


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def index_bytes(lengths: np.ndarray, dtype: str) -> bytes:
    """Content of Megatron's .idx for documents of one sequence each, with these lengths in tokens."""
    if len(lengths) and lengths.max() >= 2**31:
        raise DataError(f"a document has {lengths.max():,} tokens: Megatron's index holds at most 2^31 - 1: split it")
    count = len(lengths)
    pointers = np.zeros(count, dtype="<i8")
    pointers[1:] = np.cumsum(lengths[:-1]) * np.dtype(dtype).itemsize
    header = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], count, count + 1)
    ends = np.arange(count + 1, dtype="<i8")
    return header + lengths.astype("<i4").tobytes() + pointers.tobytes() + ends.tobytes()


def sha256_file(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_prepared(folder: str | Path, full: bool = False) -> dict:
    """Check a prepared folder and return its manifest.

    Always: every file is there with the manifest's size, every number of each .idx is what its .bin and the manifest
    say, and the tokenizer's fingerprint is the manifest's. With `full`, also the tokens, see `check_tokens`.

    Raises:
        DataError: naming the file, what it is, what it should be and what to do.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in [*manifest["files"], "tokenizer.model"]:
        path = folder / name
        if not path.is_file():
            raise DataError(f"data: '{path}' is missing: copy it again or prepare the folder again with --overwrite")
        size = path.stat().st_size
        expected = manifest["files"].get(name, {}).get("bytes", size)  # the tokenizer has its fingerprint instead
        if size != expected:
            state = "truncated" if size < expected else "too long"
            raise DataError(f"data: '{path}' is {state}: {size:,} bytes, the manifest says {expected:,}: {FIX}")
    for split, counts in manifest["splits"].items():
        size = counts["tokens"] * np.dtype(manifest["dtype"]).itemsize
        stored = manifest["files"][f"{split}.bin"]["bytes"]
        if stored != size:
            raise DataError(f"data: '{folder}/{split}.bin' ends at {stored:,} bytes, the manifest at {size:,}: {FIX}")
        index = folder / f"{split}.idx"
        check_index(index, counts, manifest["dtype"], manifest["files"][index.name]["sha256"])
    fingerprint = sha256_file(folder / "tokenizer.model")
    if fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise DataError(
            f"data: '{folder}/tokenizer.model' has fingerprint {fingerprint[:12]}, the "
            "tokens were made with "
            f"{manifest['tokenizer']['fingerprint'][:12]}: put the right tokenizer back "
            "or prepare the folder again"
        )
    if full:
        for split, counts in manifest["splits"].items():
            path = folder / f"{split}.bin"
            expected = manifest["files"][path.name]["sha256"]
            check_tokens(path, counts, manifest["dtype"], manifest["tokenizer"], expected)
    return manifest
