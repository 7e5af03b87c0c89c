"""What drawing a slice of a matrix takes beyond the slice itself, measured on a slice that is really drawn."""

from __future__ import annotations

import contextlib
import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megagamma.config.schema import Config
from megagamma.errors import MegagammaError
from megagamma.model.initialize import draw
from megagamma.model.parameters import MappedTensor, Part

PER_THREAD_BYTES = 2.5 * 2**20  # of scratch memory: `megagamma.initialization.streams.HOST_CHUNK`
SLACK_BYTES = 8 * 2**20  # the threads themselves, and what an allocator rounds up
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Drawing:
    """One slice that was drawn as a start draws it."""

    name: str
    """Of the logical matrix."""
    shape: tuple[int, ...]
    """Of the slice."""
    slice_bytes: int
    beyond_bytes: int | None
    """Peak of resident memory beyond the slice, during the drawing; None where the machine does not tell."""
    stated_bytes: int
    """What it may be at most."""
    seconds: float

    @property
    def problem(self) -> str:
        """What is wrong; empty when the peak is within what is stated, or unknown."""
        if self.beyond_bytes is None or self.beyond_bytes <= self.stated_bytes:
            return ""
        return (
            f"{self.name}: drawing a slice {'x'.join(map(str, self.shape))} took {self.beyond_bytes / 2**20:.1f} MiB beyond "
            f"the slice, {self.stated_bytes / 2**20:.1f} MiB are stated"
        )


def resident_bytes(line: str) -> int:
    """VmRSS, resident now, or VmHWM, at most since `forget_peak`, of this process. Unit: bytes.

    Raises:
        OSError, LookupError: the system does not tell; only Linux does.
    """
    for text in _STATUS.read_text().splitlines():
        if text.startswith(f"{line}:"):
            return int(text.split()[1]) * 1024
    raise LookupError(line)


def forget_peak() -> None:
    """Set VmHWM back to VmRSS, which is then without what this process has freed and not yet handed back.

    Raises:
        OSError: the system does not let it; only Linux does.
    """
    with contextlib.suppress(OSError, AttributeError):  # the GNU C library's
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")


def available_bytes() -> int | None:
    """Memory that programs can still take on this machine; None where it does not tell. Unit: bytes."""
    try:
        for text in Path("/proc/meminfo").read_text().splitlines():
            if text.startswith("MemAvailable:"):
                return int(text.split()[1]) * 1024
    except OSError:
        pass
    return None


def measure_drawing(config: Config, part: Part, dtype: torch.dtype) -> Drawing:
    """Draw a slice on the CPU, as a start does, and measure the peak of memory beyond it.

    Args:
        config: the run's.
        part: the slice.
        dtype: of the weights.

    Raises:
        MegagammaError: the slice itself does not fit in the memory that is left here.
    """
    size = dtype.itemsize
    for length in part.shape:
        size *= length
    available = available_bytes()
    stated = int(torch.get_num_threads() * PER_THREAD_BYTES) + SLACK_BYTES
    if available is not None and size + stated > available:
        raise MegagammaError(
            f"{part.logical.name}: a slice {'x'.join(map(str, part.shape))} takes {size / 2**30:.2f} GiB, and "
            f"{available / 2**30:.2f} GiB are left on this machine, so that drawing it could not be tried: use more "
            "tensor-parallel ranks, a machine with more memory, or --no_draw"
        )
    begin = time.perf_counter()
    # Written once, so that its pages are there before the drawing begins.
    out = torch.ones(part.shape, dtype=dtype)
    alone = Part(part.logical, part.start, (0, part.shape[0]), part.columns)
    # `draw` reads no more of a mapped tensor than its parts.
    tensor = MappedTensor("", None, part.shape, (alone,))  # type: ignore[arg-type]
    try:
        forget_peak()
        before: int | None = resident_bytes("VmRSS")
    except (OSError, LookupError):
        before = None
    draw(tensor, out, config)
    beyond = None if before is None else max(0, resident_bytes("VmHWM") - before)
    return Drawing(part.logical.name, part.shape, size, beyond, stated, time.perf_counter() - begin)
