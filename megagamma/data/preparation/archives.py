"""Compressed files as streams of bytes, bounded: what grows beyond reason is refused, what is cut off is noticed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from typing import IO, Any, cast

from megagamma.data.preparation.source import Shard, Source
from megagamma.errors import DataError

_BLOCK = 1 << 20
_ZSTD_INPUT = 2048  # bytes: each may stand for 32,768 of a run, all of which are held in memory
_RATIO_FROM = 1 << 30  # bytes of text, below which no ratio is too high: some text is repetitive


class _ZstdReader(io.RawIOBase):
    """A .zst file as a stream of bytes. zstandard's own reader ends silently inside a cut frame."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._make = raw, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = None
        self._ready = b""
        self._compressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._compressed or self._raw.read(_ZSTD_INPUT)
            self._compressed = b""
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._make()
            self._ready = self._frame.decompress(chunk)
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def open_bytes(path: str, compression: str) -> IO[bytes]:
    """Open a file for reading its decompressed bytes; `compression` is "", "gz", "bz2", "xz" or "zst"."""
    if compression == "gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if compression == "bz2":
        return bz2.open(path, "rb")
    if compression == "xz":
        return lzma.open(path, "rb")
    raw = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    return io.BufferedReader(_ZstdReader(raw), _BLOCK) if compression == "zst" else raw


class Growth:
    """Counts the text of a file, and stops one that grows beyond all reason."""

    def __init__(self, path: str, source: Source) -> None:
        self.path, self.most = path, source.max_ratio
        self.stored, self.text = max(1, os.stat(path).st_size), 0

    def add(self, count: int) -> None:
        self.text += count
        if self.text > _RATIO_FROM and self.text > self.most * self.stored:
            raise DataError(
                f"inputs: '{self.path}' has {self.stored:,} bytes and gave {self.text:,} so far, more than "
                f"max_ratio={self.most:g} times as many: raise --max_ratio if that is right"
            )


class _Bounded(io.RawIOBase):
    """A decompressed stream under `Growth`."""

    def __init__(self, stream: IO[bytes], growth: Growth) -> None:
        self._stream, self._growth = stream, growth

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._growth.add(len(data))
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_bounded(shard: Shard, source: Source) -> IO[bytes]:
    """A shard's file, decompressed, within the limits of its source."""
    stream = open_bytes(shard.path, shard.compression)
    if not shard.compression:
        return stream
    return io.BufferedReader(_Bounded(stream, Growth(shard.path, source)), _BLOCK)


def is_empty_decompressed(path: str, compression: str) -> bool:
    """Whether a compressed file holds no byte. What cannot be read is not empty: reading it names what is wrong."""
    try:
        with open_bytes(path, compression) as stream:
            return not stream.read(1)
    except OSError:
        return False
    except damage():
        return False


def damage() -> tuple[type[Exception], ...]:
    """What reading a truncated or corrupt compressed file raises."""
    import zstandard

    return EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError
