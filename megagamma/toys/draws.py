"""Integers that are a pure function of a seed, a name and a number, drawn for many numbers at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megagamma.initialization.streams import philox, stream_key
from megagamma.toys.contracts import Tokens

_WORDS = 4  # of a Philox block


def integers(ids: Tokens, limits: Sequence[int], seed: int, name: str) -> Tokens:
    """[n, columns]: column j of question i is uniform over 0 ... limits[j] - 1, up to limits[j] / 2^31."""
    columns = len(limits)
    blocks = -(-columns // _WORDS)
    numbers = (ids[:, None] * blocks + np.arange(blocks)).astype(np.int64)
    with np.errstate(over="ignore"):  # the words of Philox wrap around
        words = np.stack(philox(numbers, stream_key(seed, name)), axis=-1).reshape(len(ids), -1)[:, :columns]
    high = (words >> 33) & 0x7FFFFFFF
    return (high * np.asarray(limits, dtype=np.int64)) >> 31
