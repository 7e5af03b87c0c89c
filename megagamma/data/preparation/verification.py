"""What a prepared folder's files must be, checked before anything relies on them.

Of the index every number is checked, always: it is read once, some 20 bytes per document. Of the tokens (`check_tokens`)
the checksum, that every id is in the vocabulary, and that every document ends with an eos. Measured on one core of a
cloud machine, from memory: 0.9 GB/s of tokens where the processor has instructions for SHA-256 and 0.3 GB/s without, and
25 or 14 million documents of an index a second.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np

from megagamma.errors import DataError

SPLITS = ("train", "validation")
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"int32": 4, "uint16": 8}  # Megatron's numbers for the types written here
FIX = "the file is corrupt: copy it again or prepare the folder again with --overwrite"
VERIFY = "`tools/prepare_data.py --verify FOLDER` checks every file"

_CHUNK = 1 << 20  # documents, or tokens


class _Hashed:
    """Arrays of a file, one after the other, and the checksum of all that was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.hash.update(data)
        return data

    def array(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self.read(count * np.dtype(dtype).itemsize), dtype=dtype)


def check_index(path: Path, counts: dict[str, int], dtype: str, sha256: str) -> None:
    """Check every number of a split's .idx: that it is Megatron's, of one sequence per document, without a gap.

    Args:
        counts: the manifest's documents and tokens of the split.
        dtype: of the tokens.
        sha256: of the file, by the manifest.

    Raises:
        DataError: naming the file, and the document where one is concerned.
    """
    documents, itemsize = counts["documents"], np.dtype(dtype).itemsize
    size, expected = path.stat().st_size, HEADER.size + 4 * documents + 8 * documents + 8 * (documents + 1)
    with open(path, "rb") as opened:
        file = _Hashed(opened)
        try:
            magic, version, code, count, ends = HEADER.unpack(file.read(HEADER.size))
        except struct.error:
            magic, version, code, count, ends = b"", 0, 0, 0, 0
        if magic != MAGIC or version != 1:
            raise DataError(f"data: '{path}' is not a Megatron index of version 1: {FIX}")
        if code != DTYPE_CODES[dtype] or count != documents or ends != count + 1:
            raise DataError(
                f"data: '{path}' says type {code} and {count:,} documents, the manifest says "
                f"{dtype} (type {DTYPE_CODES[dtype]}) and {documents:,}: {FIX}"
            )
        if size != expected:
            raise DataError(f"data: '{path}' has {size:,} bytes, {documents:,} documents need {expected:,}: {FIX}")
        chunks = [(start, min(_CHUNK, documents - start)) for start in range(0, documents, _CHUNK)]
        # 8 bytes per document are kept, as the pointers must be.
        pointers = np.empty(documents + 1, dtype=np.int64)
        pointers[0] = 0
        for start, length in chunks:
            lengths = file.array("<i4", length)
            _require(path, start, lengths >= 1, lengths, "length", "must be 1 or more tokens")
            total = np.cumsum(lengths, dtype=np.int64) * itemsize
            pointers[start + 1 : start + length + 1] = pointers[start] + total
        for start, length in chunks:
            stored = file.array("<i8", length)
            rule = "must be the bytes of the documents before it"
            _require(path, start, stored == pointers[start : start + length], stored, "pointer", rule)
        for start, length in [*chunks, (documents, 1)]:
            stored = file.array("<i8", length)
            rule = "must be its number, one sequence per document"
            _require(path, start, stored == np.arange(start, start + length), stored, "index", rule)
    if pointers[-1] != counts["tokens"] * itemsize:
        raise DataError(
            f"data: '{path.with_suffix('.bin')}' has {counts['tokens'] * itemsize:,} bytes, its .idx ends at "
            f"{pointers[-1]:,}: {FIX}"
        )
    if file.hash.hexdigest() != sha256:
        raise DataError(f"data: '{path}' does not have the manifest's sha256: {FIX}")


def _require(path: Path, start: int, holds: np.ndarray, stored: np.ndarray, what: str, rule: str) -> None:
    if not holds.all():
        first = int(np.argmin(holds))
        raise DataError(
            f"data: '{path}': document {start + first:,} has {what} {int(stored[first]):,}, which {rule}: {FIX}"
        )


def document_ends(path: Path, documents: int) -> np.ndarray:
    """Where each document of a checked .idx ends, in tokens: int64 [documents]."""
    lengths = np.memmap(path, dtype="<i4", mode="r", offset=HEADER.size, shape=(documents,))
    return np.cumsum(lengths, dtype=np.int64)


def check_tokens(path: Path, counts: dict[str, int], dtype: str, tokenizer: dict[str, Any], sha256: str) -> None:
    """Check a split's .bin: its checksum, that ids are in the vocabulary, and that documents end with an eos.

    Args:
        path: of the .bin; its .idx must have passed `check_index`.
        tokenizer: the manifest's, with vocab_size and eos_id.

    Raises:
        DataError: naming the file, and the first document whose tokens cannot be right.
    """
    ends = document_ends(path.with_suffix(".idx"), counts["documents"])
    problem = ""
    with open(path, "rb") as opened:
        file = _Hashed(opened)
        for start in range(0, counts["tokens"], _CHUNK):
            tokens = file.array(dtype, min(_CHUNK, counts["tokens"] - start))
            if not problem:
                problem = _token_problem(tokens, start, ends, tokenizer["vocab_size"], tokenizer["eos_id"])
    # What is wrong with the tokens names a document, which a checksum cannot.
    if problem:
        raise DataError(f"data: '{path}': {problem}: {FIX}")
    if file.hash.hexdigest() != sha256:
        raise DataError(f"data: '{path}' does not have the manifest's sha256: {FIX}")


def _token_problem(tokens: np.ndarray, start: int, ends: np.ndarray, vocab_size: int, eos_id: int) -> str:
    """What is wrong with a file's tokens from token `start` on; empty when nothing is."""
    last = (
        ends[np.searchsorted(ends, start, side="right") : np.searchsorted(ends, start + len(tokens), side="right")] - 1
    )
    wrong = np.flatnonzero(tokens[last - start] != eos_id)
    if len(wrong):
        place = int(last[wrong[0]])
        return f"document {np.searchsorted(ends, place, side='right'):,} does not end with the eos {eos_id}"
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        first = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        document = np.searchsorted(ends, start + first, side="right")
        return f"document {document:,} has token id {int(tokens[first])}, the vocabulary has 0 to {vocab_size - 1}"
    return ""
