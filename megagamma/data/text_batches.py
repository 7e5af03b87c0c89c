"""Batches of text: the training source and the evaluation set of prepared folders."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megagamma.config.schema import DataConfig
from megagamma.data.blend import Blend
from megagamma.data.contracts import Batch
from megagamma.data.text import Corpus
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import DataError


def collate(
    rows: np.ndarray,
    eos_id: int,
    reset_positions: bool = False,
    reset_attention: bool = False,
    mask_eod_loss: bool = False,
) -> Batch:
    """Rows of sequence_length + 1 tokens -> the tensors of a batch.

    Args:
        rows: int64 [b, s + 1].
        reset_positions: count positions from 0 again after each eos.
        reset_attention: add document_ids, 0 in a row's first document and one more after each eos.
        mask_eod_loss: no loss where the *input* is eos, that is for predicting the first token of an unrelated document
            (Megatron's eod_mask_loss). Predicting the eos itself is always learned.
    """
    tokens, labels = rows[:, :-1], rows[:, 1:]
    ended = tokens == eos_id
    mask = np.where(ended, np.float32(0), np.float32(1)) if mask_eod_loss else np.ones(tokens.shape, np.float32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if reset_positions:
        starts = np.zeros(tokens.shape, dtype=np.int64)
        starts[:, 1:] = np.where(ended[:, :-1], positions[:, 1:], 0)
        positions = positions - np.maximum.accumulate(starts, axis=1)
    arrays: dict[str, Any] = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
    if reset_attention:
        arrays["document_ids"] = np.cumsum(ended, axis=1) - ended
    return Batch(**{name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})


def collate_options(data: DataConfig) -> dict[str, Any]:
    """The options of `collate` that a config asks for."""
    names = ("reset_positions", "reset_attention", "mask_eod_loss")
    return {name: getattr(data, name) for name in names}


class TextSource:
    """Training batches of a blend. See `collate` for the options."""

    def __init__(self, blend: Blend, **options: Any) -> None:
        self.blend, self.options = blend, options
        self.eos_id = blend.samplers[0].corpus.eos_id
        self.tokenizer_path = blend.samplers[0].corpus.tokenizer_path

    def batch(self, ids: Sequence[int]) -> Batch:
        """The samples `ids` as a batch, one a row."""
        return collate(np.stack([self.blend[index] for index in ids]), self.eos_id, **self.options)


class TextEvaluation:
    """A split in file order, cut into sequences that predict every token but the very first exactly once.

    Sample i holds tokens i s ... i s + s of the joined documents (s = sequence_length) and predicts all but its first. The
    last one is padded, with loss_mask 0 on the padding.

    bits per byte = summed loss in nats / (ln 2 x UTF-8 bytes of text behind the labels).

    Attributes:
        size: sequences of the set.
        tokens, bytes: of the split; `bytes` is the text's, a few more than the labels' for its first token.
    """

    needs: Literal["loss", "token_scores"] = "loss"
    sums: tuple[str, ...] = ("nats", "tokens", "bytes")

    def __init__(self, corpus: Corpus, sequence_length: int, **options: Any) -> None:
        if corpus.tokens < 2:
            raise DataError(
                f"data: '{corpus.folder}' ({corpus.split}) has {corpus.tokens} tokens: at least 2 are needed"
            )
        self.corpus, self.sequence_length, self.options = corpus, sequence_length, options
        self.tokens, self.bytes = corpus.tokens, corpus.bytes
        self.size = -(-(corpus.tokens - 1) // sequence_length)

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        return Tokenizer(self.corpus.tokenizer_path).token_bytes()

    def batch(self, ids: Sequence[int]) -> Batch:
        """Sequences `ids`, one a row, with label_bytes."""
        length = self.sequence_length
        rows = np.full((len(ids), length + 1), self.corpus.pad_id, dtype=np.int64)
        valid = np.zeros(len(ids), dtype=np.int64)
        for row, index in enumerate(ids):
            start = min(index * length, self.tokens)
            tokens = self.corpus.stream(start, min(start + length + 1, self.tokens))
            if not self.corpus.is_valid(tokens):
                self._refuse(start, start + len(tokens))
            rows[row, : len(tokens)] = tokens
            valid[row] = max(0, len(tokens) - 1)
        batch = collate(rows, self.corpus.eos_id, **self.options)
        inside = np.arange(length) < valid[:, None]
        batch.loss_mask *= torch.from_numpy(inside)
        batch.label_bytes = torch.from_numpy(self._token_bytes[rows[:, 1:]] * inside)
        return batch

    def _refuse(self, start: int, stop: int) -> None:
        """Raise for the first of the split's tokens [start, stop) that is not in the vocabulary."""
        ends = np.cumsum(self.corpus.document_lengths, dtype=np.int64)
        first, last = np.searchsorted(ends, (start, stop - 1), side="right").tolist()
        for document in range(first, last + 1):
            begin, end = (int(ends[document - 1]) if document else 0), int(ends[document])
            self.corpus.refuse(self.corpus.stream(max(start, begin), min(stop, end)), document)

    def measure(self, batch: Batch, output: Tensor) -> Tensor:
        """Nats, tokens and bytes of a batch; output: the loss per token [b, s]."""
        assert batch.label_bytes is not None
        parts = ((output.float() * batch.loss_mask).sum(), batch.loss_mask.sum(), batch.label_bytes.sum())
        return torch.stack([part.double() for part in parts])

    def scores(self, sums: Tensor) -> dict[str, float]:
        """Loss in nats per token, and bits per byte."""
        nats, tokens, text_bytes = sums.tolist()
        return {"loss": nats / max(tokens, 1.0), "bits_per_byte": nats / (math.log(2) * max(text_bytes, 1.0))}

    def describe(self, scores: dict[str, float], sums: Tensor) -> str:
        """As a phrase for the console."""
        tokens = int(sums[1])
        return f"{scores['loss']:.4f} nats/token, {scores['bits_per_byte']:.4f} bits/byte over {tokens:,} tokens"
