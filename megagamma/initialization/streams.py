"""Counter-based normal numbers: (seed, parameter name, global element index) -> float32.

Element ``i`` (row-major index in the *global* parameter) is a pure function of ``(seed, name, i)``, so every
rank draws just the slice that it owns, and slices drawn under any tensor/pipeline/expert/data-parallel
layout, chunk size or thread count agree to the bit with the one global draw.

Bits     Philox4x64-10. The 128-bit key is BLAKE2b of (format version, seed, name). Block ``b`` (counter word
         0 set to ``b + 1``, word 3 to the redraw number) gives four 64-bit words and so the eight elements
         ``8b .. 8b+7``: a word's high half is the radius and its low half the angle of one Box-Muller pair
         of adjacent elements. CPU: ``numpy.random.Philox``, whose raw stream NumPy guarantees. Elsewhere:
         the same integers in torch.
Normals  Box-Muller from operations that IEEE 754 rounds correctly, each a kernel of its own (nothing for a
         compiler to contract into a fused multiply-add): float32 add, subtract, multiply and square root,
         int32 -> float32 conversion, min/max/floor and integer arithmetic. No libm or CUDA
         ``log``/``sin``/``cos``, whose last bits differ between libraries. Python floats passed as operands
         are exact in float32. One source serves NumPy (CPU) and torch (other devices): both spell these
         operations alike, but for ``_copy`` and ``_sqrt``.

Change anything that alters a drawn bit only together with ``FORMAT``: runs are reproduced from these streams.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

FORMAT = b"stream-1"  # BLAKE2b salt
HOST_CHUNK = 1 << 17  # elements per CPU thread at a time: 2.5 MB, cached, yet few hand-overs between threads
DEVICE_CHUNK = 1 << 22  # elements at a time on another device: some 0.2 GB of temporaries
MIN_TRUNCATE = 0.1  # redrawing below this would throw away more than 92 % of all draws

_BLOCK = 8  # elements per Philox block
_SHORT = 12  # blocks: shorter ranges on the CPU are drawn together by the vectorised Philox
_FEW = 128  # single blocks: up to so many are drawn one by one on the CPU
_HIGH = 1 if sys.byteorder == "little" else 0  # which int32 half of a 64-bit word holds the high bits
_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
_PHILOX_MUL = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_PHILOX_BUMP = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)

_hex = float.fromhex
# Minimax polynomials with float32 coefficients, highest power first.
# -2 ln(1 + f) / f on [-1/2, 0], relative error 2.4e-8.
_LN = tuple(map(_hex, ("-0x1.6a0bp+1", "-0x1.a39118p+1", "-0x1.3549d4p+1", "-0x1.72156ep-2", "-0x1.0df4d8p-1",
                       "0x1.f3144cp-2", "-0x1.55a382p-1", "0x1.fffec0p-1", "-0x1p+1")))  # fmt: skip
# sin(pi/2 x) / x and cos(pi/2 x) in y = x * x on [0, 1], absolute errors 0.8e-8 and 6e-8.
_SIN = tuple(map(_hex, ("0x1.3911b2p-13", "-0x1.31fbeep-8", "0x1.466504p-4",
                        "-0x1.4abba2p-1", "0x1.921fb4p+0")))  # fmt: skip
_COS = tuple(map(_hex, ("0x1.c09cc2p-11", "-0x1.54e3p-6", "0x1.03bc5cp-2",
                        "-0x1.3bd39ep+0", "0x1.fffffep-1")))  # fmt: skip
_MINUS_2LN2 = -float(np.float32(2 * math.log(2)))


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """The Philox key, as two 64-bit words, of parameter ``name`` under ``seed``."""
    message = seed.to_bytes(8, "little") + name.encode()
    digest = hashlib.blake2b(message, digest_size=16, person=b"megagamma-init", salt=FORMAT).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _multiply_high(x, multiplier: int):
    """High and low 64 bits of the unsigned product; int64 stands for unsigned words."""
    low, high = multiplier & _MASK32, multiplier >> 32
    x_low, x_high = x & _MASK32, (x >> 32) & _MASK32
    mid = x_high * low + ((x_low * low >> 32) & _MASK32)
    carry = x_low * high + (mid & _MASK32)
    return x_high * high + ((mid >> 32) & _MASK32) + ((carry >> 32) & _MASK32), x * _signed(multiplier)


def philox(blocks, key: tuple[int, int], attempt: int = 0):
    """The four words of each block of an int64 array or tensor of block numbers, each in its shape."""
    k0, k1 = key
    c0, c1 = blocks + 1, blocks * 0
    c2, c3 = c1, c1 + attempt
    for _ in range(10):
        high0, low0 = _multiply_high(c0, _PHILOX_MUL[0])
        high1, low1 = _multiply_high(c2, _PHILOX_MUL[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(k0), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = (k0 + _PHILOX_BUMP[0]) & _MASK64, (k1 + _PHILOX_BUMP[1]) & _MASK64
    return c0, c1, c2, c3


def _on_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _copy(target, source) -> None:
    if isinstance(target, np.ndarray):
        np.copyto(target, source, casting="unsafe")
    else:
        target.copy_(source)


def _sqrt(x) -> None:
    if isinstance(x, np.ndarray):
        np.sqrt(x, out=x)  # the CPU's instruction
    else:
        # Some of torch's float32 kernels (MKL's on CPUs) are an ulp off now and then. By way of float64 the
        # root comes out correctly rounded: it is never within 4 ulp of float64 of a tie of two float32.
        x.copy_(x.double().sqrt_())


def _polynomial(xp, coefficients, x, out) -> None:
    xp.multiply(x, coefficients[0], out=out)
    for c in coefficients[1:-1]:
        xp.add(out, c, out=out)
        xp.multiply(out, x, out=out)
    xp.add(out, coefficients[-1], out=out)


def _box_muller(xp, words, z, scratch, iscratch) -> None:
    """Two adjacent normals in ``z`` for each int64 word; ``iscratch`` is the float32 ``scratch`` as int32."""
    t, p, e, r = scratch
    it, ip, ie, ir = iscratch
    # t in [-1/2, 1/2], never 0, is the uniform number u if positive, else u - 1: precise at both ends.
    _copy(t, words.view(it.dtype)[_HIGH::2])
    xp.multiply(t, 2.0**-32, out=t)
    xp.add(t, 2.0**-33, out=t)
    # ln u = ln(1 + f) + exponent * ln 2, f in [-1/2, 0]: f = t and exponent = 0 where t < 0 (there p = 1),
    # else p = u = (1 + f) * 2**exponent. Both terms have one sign: nothing cancels.
    xp.floor(t, out=p)
    xp.negative(p, out=p)
    xp.maximum(p, t, out=p)
    xp.subtract(ip, 0x3F000001, out=ie)
    xp.bitwise_and(ie, -0x800000, out=ie)  # exponent << 23
    xp.subtract(ip, ie, out=ip)
    xp.subtract(p, 1.0, out=p)
    xp.minimum(p, t, out=p)
    _copy(t, ie)
    xp.multiply(t, _MINUS_2LN2 * 2.0**-23, out=t)
    _polynomial(xp, _LN, p, r)
    xp.multiply(r, p, out=r)
    xp.add(r, t, out=r)
    _sqrt(r)
    # Angle pi/2 * x, x in [-1, 1], from the low 31 bits; the top bit turns it by pi: the radius' sign.
    _copy(ie, words)  # the low halves
    xp.bitwise_and(ie, -0x80000000, out=it)
    xp.bitwise_or(ir, it, out=ir)  # r > 0; NumPy's copysign takes five times as long
    xp.add(ie, ie, out=ie)
    _copy(t, ie)
    xp.multiply(t, 2.0**-31, out=t)
    xp.multiply(t, t, out=p)
    _polynomial(xp, _COS, p, e)
    xp.multiply(e, r, out=z[0::2])
    _polynomial(xp, _SIN, p, e)
    xp.multiply(e, t, out=e)
    xp.multiply(e, r, out=z[1::2])


class _Worker:
    """One thread's scratch memory and bit source: draws ranges of whole blocks of one stream."""

    def __init__(self, key: tuple[int, int], device: torch.device, blocks: int) -> None:
        self.key = key
        self.device = device
        self.host = _on_host(device)
        self.xp = np if self.host else torch
        self.scratch, self.iscratch = self._scratch(4 * blocks)
        self.z = self._empty(_BLOCK * blocks)
        if self.host:
            self.generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=0)
            self.state = self.generator.state  # a copy, with an empty word buffer

    def _empty(self, size: int):
        if self.host:
            return np.empty(size, dtype=np.float32)
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def _scratch(self, size: int):
        arrays = [self._empty(size) for _ in range(4)]
        return arrays, [a.view(np.int32 if self.host else torch.int32) for a in arrays]

    def arange(self, stop: int):
        return np.arange(stop, dtype=np.int64) if self.host else torch.arange(stop, device=self.device)

    def _words(self, first, blocks: int, dense: bool, attempt: int):
        """The words, as int64, of ``blocks`` blocks from each block in ``first``, in element order."""
        if self.host and (dense or blocks >= _SHORT or len(first) <= _FEW):
            counter = self.state["state"]["counter"]
            counter[3] = attempt
            ranges = len(first)
            if dense:
                first, blocks, ranges = first[:1], ranges * blocks, 1
            words = np.empty((ranges, 4 * blocks), dtype=np.uint64) if ranges > 1 else None
            for row, block in enumerate(first):
                counter[0] = block  # NumPy counts up before it generates
                self.generator.state = self.state
                raw = self.generator.random_raw(4 * blocks)
                if words is None:
                    words = raw
                else:
                    words[row] = raw
            return words.reshape(-1).view(np.int64)
        number = (first[:, None] + self.arange(blocks)).reshape(-1)
        return self.xp.stack(philox(number, self.key, attempt), -1).reshape(-1)

    def draw(self, first, blocks: int, dense: bool, limit: float | None, out=None):
        """Normals of ``blocks`` blocks from each block in ``first``, in ``out`` or in scratch memory.

        ``dense``: the ranges of blocks follow each other. ``out``: float32, of exactly their size.
        """
        words = self._words(first, blocks, dense, 0)
        z = self.z[: 2 * len(words)] if out is None else out
        scratch, iscratch = [[s[: len(words)] for s in group] for group in (self.scratch, self.iscratch)]
        _box_muller(self.xp, words, z, scratch, iscratch)
        if limit is not None:
            self._redraw(z, first, blocks, dense, limit)
        return z

    def _redraw(self, z, first, blocks: int, dense: bool, limit: float) -> None:
        """Replaces the values beyond ``limit`` by the same elements' values of attempt 1, 2, ..."""
        bad = self._beyond(z, limit)
        for attempt in itertools.count(1):
            count = len(bad)
            if count == 0:
                return
            pair = bad // 2
            # On the CPU whichever is fastest: the bits of all elements anew, or those of single blocks.
            if self.host and 1000 * count > len(z) and (dense or blocks >= _SHORT):
                words = self._words(first, blocks, dense, attempt)[pair]
            else:
                block = bad // _BLOCK
                block = first[block // blocks] + block % blocks
                words = self._words(block, 1, False, attempt)[4 * self.arange(count) + pair % 4]
            both = self._empty(2 * count)
            _box_muller(self.xp, words, both, *self._scratch(count))
            fresh = both[2 * self.arange(count) + bad % 2]
            z[bad] = fresh
            bad = bad[self._beyond(fresh, limit)]

    def _beyond(self, z, limit: float):
        mask = abs(z) > limit
        return np.flatnonzero(mask) if self.host else mask.nonzero().flatten()


def _fill_rows(out: Tensor, key, base: int, stride: int, scale: float, limit: float | None) -> None:
    """Fills 2-D ``out``: its row ``j`` holds the elements from ``base + j * stride`` on."""
    rows, length = out.shape
    host = _on_host(out.device)
    chunk = max(HOST_CHUNK if host else DEVICE_CHUNK, _BLOCK)
    step = min(length, chunk // _BLOCK * _BLOCK)  # columns per chunk
    aligned = stride % _BLOCK == 0 or rows == 1
    # Columns step in multiples of _BLOCK: if aligned, all ranges have one offset into their first blocks.
    blocks = ((base % _BLOCK if aligned else _BLOCK - 1) + step + _BLOCK - 1) // _BLOCK
    height = min(rows, max(1, chunk // (blocks * _BLOCK))) if step == length else 1  # rows per chunk
    across = -(-length // step)
    jobs = -(-rows // height) * across
    counter = itertools.count()  # next() is atomic: threads share it

    def work(_: int = 0) -> None:
        worker = _Worker(key, out.device, height * blocks)
        while (job := next(counter)) < jobs:
            row, column = job // across * height, job % across * step
            target = out[row : row + height, column : column + step]
            k, n = target.shape
            start = base + row * stride + column
            first = (worker.arange(k) * stride + start) // _BLOCK
            dense = k == 1 or stride == blocks * _BLOCK
            # Whole blocks that lie in memory as they are drawn are drawn in their place.
            in_place = n == blocks * _BLOCK and (start | stride) % _BLOCK == 0 and target.is_contiguous()
            in_place = in_place and target.dtype == torch.float32
            place = (target.view(-1).numpy() if worker.host else target.view(-1)) if in_place else None
            z = worker.draw(first, blocks, dense, limit, place)
            if scale != 1.0:
                worker.xp.multiply(z, scale, out=z)
            if in_place:
                continue
            z = (torch.from_numpy(z) if worker.host else z).view(k, blocks * _BLOCK)
            # Rows whose starts agree modulo the block size are copied together.
            period = _BLOCK // math.gcd(stride, _BLOCK)
            for r in range(min(period, k)):
                offset = (start + r * stride) % _BLOCK
                target[r::period].copy_(z[r::period, offset : offset + n])

    threads = min(torch.get_num_threads(), jobs // 2) if host else 1
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    else:
        work()


def _fill(out: Tensor, key, shape, start, base: int, scale: float, limit: float | None) -> None:
    # A trailing dimension that is whole, and laid out so in out, is part of the rows of the one before it.
    while len(shape) > 1 and out.shape[-1] == shape[-1]:
        if out.shape[-2] > 1 and out.stride(-2) != out.shape[-1] * out.stride(-1):
            break
        out = out.flatten(-2)
        shape, start = (*shape[:-2], shape[-2] * shape[-1]), (*start[:-2], start[-2] * shape[-1] + start[-1])
    if len(shape) > 2:
        size = math.prod(shape[1:])
        for i, part in enumerate(out):
            _fill(part, key, shape[1:], start[1:], base + (start[0] + i) * size, scale, limit)
    elif len(shape) == 2:
        _fill_rows(out, key, base + start[0] * shape[1] + start[1], shape[1], scale, limit)
    else:
        _fill_rows(out[None], key, base + sum(start), 0, scale, limit)


def truncated_variance(k: float) -> float:
    """Variance of a standard normal truncated to ``[-k, k]``: ``1 - 2 k phi(k) / (2 Phi(k) - 1)``.

    As ``1 - 1 / S`` with ``S = sum over n of k^(2n) / (1 * 3 * ... * (2n + 1))``, whose terms are all
    positive and need only +, * and /: the same double on every machine, unlike libm's ``erf``.
    """
    if k > 9:
        return 1.0  # to the last bit of a double
    term, rest, n = 1.0, 0.0, 1
    while term > 1e-18 * rest:
        term *= k * k / (2 * n + 1)
        rest += term
        n += 1
    return rest / (1.0 + rest)


def normal_(
    out: Tensor,
    *,
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    start: tuple[int, ...] | None = None,
    std: float = 1.0,
    truncate: float | None = None,
) -> Tensor:
    """Fills ``out`` with a slice of the normal tensor that (seed, name) stands for, and returns it.

    The global tensor has shape ``global_shape``; the slice starts at ``start`` (default: the origin) and has
    the shape of ``out``, which may have any float dtype, device and strides. Values are drawn in float32,
    multiplied by ``float32(std)`` and cast once. Meta tensors come back as they are.

    ``truncate=k`` cuts the standard normal distribution at ``k``: an element with ``|z| > k`` is redrawn
    (each with its own attempts 1, 2, ..., so slices still agree). The result is rescaled so that the standard
    deviation *of what is drawn* is ``std``: the largest magnitude is ``k * std / sqrt(v)``, where
    ``v = truncated_variance(k)`` (0.774 at k = 2, 0.973 at k = 3).
    """
    shape = tuple(map(operator.index, global_shape))
    origin = (0,) * len(shape) if start is None else tuple(map(operator.index, start))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer in [0, 2**64), not {seed!r}")
    if not out.is_floating_point():
        raise ValueError(f"{name}: out must have a floating-point dtype, not {out.dtype}")
    if not len(shape) == len(origin) == out.ndim:
        sizes = f"out {tuple(out.shape)}, global_shape {shape} and start {origin}"
        raise ValueError(f"{name}: {sizes} differ in rank")
    if any(s < 0 or s + n > g for s, n, g in zip(origin, out.shape, shape, strict=True)):
        raise ValueError(f"{name}: a slice {tuple(out.shape)} at {origin} does not fit within {shape}")
    if math.prod(shape) >= 1 << 62:
        raise ValueError(f"{name}: global_shape {shape} has more than 2**62 elements")
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"{name}: std must be finite and >= 0, not {std!r}")
    scale, limit = float(std), None
    if truncate is not None:
        if not truncate >= MIN_TRUNCATE:
            raise ValueError(f"{name}: truncate must be > 0, and at least {MIN_TRUNCATE}, not {truncate!r}")
        scale /= math.sqrt(truncated_variance(float(truncate)))
        limit = float(np.float32(truncate))
    if scale > float(np.finfo(np.float32).max):
        raise ValueError(f"{name}: std {std!r} overflows float32")
    scale = float(np.float32(scale))
    if out.is_meta or out.numel() == 0:
        return out
    target = out.detach()
    if scale == 0:
        target.zero_()
        return out
    if target.ndim == 0:
        target, shape, origin = target.view(1), (1,), (0,)
    _fill(target, stream_key(seed, name), shape, origin, 0, scale, limit)
    return out


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of the bytes of ``tensor``, in row-major order."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()
