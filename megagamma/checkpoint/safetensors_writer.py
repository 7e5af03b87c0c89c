"""safetensors files written tensor by tensor, so that a writer never holds more than one.

The safetensors package writes a dictionary that is whole in memory; the format itself (8 bytes of header length,
a JSON header with each tensor's dtype, shape and byte range, then the bytes) lets the tensors come one by one. What
is written here is read back by the package.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megagamma.owned import file_digest

_ALIGNMENT = 8
_CHUNK = 1 << 20  # numbers that are converted at a time
# safetensors' name and bytes of a number.
DTYPES = {torch.float32: ("F32", 4), torch.bfloat16: ("BF16", 2)}


class ShardWriter:
    """Writes one file of tensors of one dtype, in the order in which they were announced."""

    def __init__(
        self, path: Path, entries: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype = torch.float32
    ) -> None:
        """Args: entries: name and shape of every tensor that will be written, in order; dtype: one of `DTYPES`."""
        word, width = DTYPES[dtype]
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in entries:
            size = width * int(torch.Size(shape).numel())
            header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.path, self._expected, self._dtype = path, list(entries), dtype
        self._digest = xxhash.xxh3_128()
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._put(len(text).to_bytes(8, "little") + text)

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, rounded to the file's dtype chunk by chunk.

        Raises:
            ValueError: it is not the one announced.
        """
        expected, shape = self._expected.pop(0)
        if name != expected or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{self.path.name}: expected {expected} {shape}, was given {name} {tuple(tensor.shape)}")
        for chunk in tensor.detach().reshape(-1).split(_CHUNK):
            values = chunk.to("cpu", self._dtype).contiguous()
            self._put(values.view(torch.uint8).numpy().data)

    def close(self) -> tuple[int, str]:
        """Finish the file durably; returns its size in bytes and its checksum.

        Raises:
            ValueError: an announced tensor is missing.
        """
        if self._expected:
            raise ValueError(f"{self.path.name}: {len(self._expected)} tensors are missing")
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return size, self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file without finishing it. What could not be written is not tried again."""
        with contextlib.suppress(OSError):
            self._file.close()


def checksum(path: Path) -> str:
    """The checksum that `ShardWriter.close` gave, from the file."""
    return file_digest(path, "xxh3_128").removeprefix("xxh3_128:")
