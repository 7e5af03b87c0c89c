"""What training and evaluation ask of data. Prepared text is one implementation; a synthetic task can be another.

    source.batch([0, 1, 2, 3]) -> Batch        # samples 0 to 3 of an endless, seeded sequence
    evaluation_set.batch([0, 1]) -> Batch      # samples 0 and 1 of a fixed set
    evaluation_set.measure(batch, output) -> [sums]; evaluation_set.scores(sums over all samples) -> {name: value}

Sample i is a pure function of the source and i: it depends neither on the layout, nor on the process that asks, nor on what
was read before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """b sequences of s positions. What a field is None for, the source does not say."""

    tokens: Tensor
    """Input token ids, int64 [b, s]."""
    labels: Tensor
    """The token to predict at each position, int64 [b, s]."""
    loss_mask: Tensor
    """Weight of each position's loss, float32 [b, s]; 0 where nothing is to be learned."""
    position_ids: Tensor
    """Position of each token for the rotary embedding, int64 [b, s]."""
    document_ids: Tensor | None = None
    """Document of each token, int64 [b, s]: attention stays within one. None: attention over the whole sequence."""
    label_bytes: Tensor | None = None
    """UTF-8 bytes of text behind each label, int64 [b, s], 0 on padding."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        tensors: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            tensors[field.name] = None if value is None else value.to(device, non_blocking=True)
        return Batch(**tensors)


class TrainingSource(Protocol):
    """An endless sequence of samples."""

    def batch(self, ids: Sequence[int]) -> Batch:
        """The samples `ids` (0, 1, ... without end), one a row; all of one length."""
        ...


class EvaluationSet(Protocol):
    """A fixed set of samples, what is measured on each, and what the sums mean."""

    size: int
    """Samples."""
    needs: Literal["loss", "token_scores"]
    """What `measure` gets of the model: the loss per token [b, s] in nats, or [b, s, 2] with the log-probability of each
    label in nats and the most likely token."""
    sums: tuple[str, ...]
    """Names of what `measure` returns, for people."""

    def batch(self, ids: Sequence[int]) -> Batch:
        """The samples `ids`, one a row. A number of `size` or more stands for an empty sample with loss_mask 0, so that
        ranks with unequal shares run equally many batches."""
        ...

    def measure(self, batch: Batch, output: Tensor) -> Tensor:
        """Sums over a batch, float64 [len(sums)]; the sums of all batches are added up, over all ranks."""
        ...

    def scores(self, sums: Tensor) -> dict[str, float]:
        """Metrics by name from the sums over the samples; `loss` in nats per token is one of them."""
        ...

    def describe(self, scores: dict[str, float], sums: Tensor) -> str:
        """The scores as a phrase for the console."""
        ...


class TextCodec(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    eos_id: int
    pad_id: int
    fingerprint: str
    """Hexadecimal; equal for codecs that give equal ids."""
    path: str
    """Its file."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without control tokens."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids."""
        ...


def microbatch_ids(
    first_sample: int, micro_index: int, micro_batch_size: int, rank: int, data_parallel_size: int
) -> list[int]:
    """Sample ids of one microbatch of one data-parallel rank.

    A global batch is the samples first_sample ... first_sample + size - 1, dealt out microbatch by microbatch and within
    one rank by rank, so that every layout trains on the same set at each step.
    """
    start = first_sample + (micro_index * data_parallel_size + rank) * micro_batch_size
    return list(range(start, start + micro_batch_size))


def rank_microbatches(
    source: TrainingSource | EvaluationSet,
    first_sample: int,
    size: int,
    micro_batch_size: int,
    rank: int,
    data_parallel_size: int,
) -> list[Batch]:
    """One data-parallel rank's microbatches of the samples first_sample ... first_sample + size - 1.

    Args:
        size: samples over all ranks; a multiple of micro_batch_size x data_parallel_size, as the config's rules have it.
    """
    count, rest = divmod(size, micro_batch_size * data_parallel_size)
    if rest or count == 0:
        raise ValueError(f"{size} samples are no multiple of {micro_batch_size} x {data_parallel_size} ranks")
    return [
        source.batch(microbatch_ids(first_sample, index, micro_batch_size, rank, data_parallel_size))
        for index in range(count)
    ]
