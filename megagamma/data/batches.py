"""Token files to batches: which sample is number i, and what a rank reads for a step.

Sample i of a training run is a pure function of (prepared folders, weights, sequence length, seed, i). It
depends neither on the number of steps, nor on the layout, nor on the process that asks. So a run resumes by
its sample counter alone, and every layout sees the same global batch.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megagamma.data.preparation.indexing import verify_prepared
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError, DataError

_BLEND_BLOCK = 1 << 16


class Corpus:
    """One split of a prepared folder, memory-mapped through Megatron's IndexedDataset.

    Attributes:
        name: the folder's last component, which names the corpus in reports.
        documents, tokens, bytes: of this split; tokens count one end-of-text per document, bytes the UTF-8
            text.
        document_lengths: int32 [documents], in tokens, end-of-text included.
        vocab_size, eos_id, pad_id, tokenizer_path, tokenizer_fingerprint: of the tokenizer that made it.

    Raises:
        DataError: whatever `verify_prepared` finds, or a split that the folder does not have.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        manifest = verify_prepared(folder)
        if split not in manifest["splits"]:
            raise DataError(
                f"data: '{folder}' has no split '{split}' (it has {', '.join(manifest['splits'])}): "
                "prepare it with a validation_fraction above 0"
            )
        # Imported late: megatron takes seconds to import, and preparing text does not need it.
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.folder, self.split, self.name = str(folder), split, Path(folder).resolve().name
        self.dataset = IndexedDataset(str(Path(folder) / split))
        counts, tokenizer = manifest["splits"][split], manifest["tokenizer"]
        self.documents, self.tokens, self.bytes = counts["documents"], counts["tokens"], counts["bytes"]
        self.document_lengths = self.dataset.sequence_lengths
        self.vocab_size, self.eos_id = tokenizer["vocab_size"], tokenizer["eos_id"]
        self.pad_id, self.tokenizer_fingerprint = tokenizer["pad_id"], tokenizer["fingerprint"]
        self.tokenizer_path = str(Path(folder) / "tokenizer.model")

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, in the file's own type; a view of the file."""
        return self.dataset.get(document, offset=start, length=stop - start)

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of all documents joined in file order; a view of the file."""
        index = self.dataset.index
        return self.dataset.bin_reader.read(dtype=index.dtype, count=stop - start, offset=start * index.dtype_size)


def keyed_permutation(count: int, *key: object) -> np.ndarray:
    """A permutation of range(count), int64, that depends on (count, key) alone.

    The order of raw Philox draws, sorted stably: unlike `Generator.permutation`, it is the same in every
    version of numpy, so that a run resumed years later still sees its data in order.
    """
    text = "\x1f".join(map(str, key)).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=digest).random_raw(count), kind="stable")


class CorpusSampler:
    """An endless, seeded sequence of windows of one corpus.

    In epoch e the documents are permuted and joined, cut into windows of sequence_length + 1 tokens that
    overlap by one (so every token but the first is a label once), and the windows are permuted. Both
    permutations are keyed by (seed, name, e). At most sequence_length - 1 tokens at an epoch's end are left
    out of it.

    Args:
        name: tells corpora of one blend apart; part of the key, so no path of a machine should be in it.

    Raises:
        DataError: the corpus has fewer than sequence_length + 1 tokens.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int, name: str | None = None) -> None:
        if sequence_length < 2:
            raise ConfigurationError(f"data.sequence_length={sequence_length} must be 2 or more")
        if corpus.tokens < sequence_length + 1:
            raise DataError(
                f"data: '{corpus.folder}' ({corpus.split}) has {corpus.tokens:,} tokens "
                f"in {corpus.documents:,} "
                f"documents, fewer than data.sequence_length + 1 = {sequence_length + 1:,}: "
                f"use data.sequence_length <= {corpus.tokens - 1}, or more text"
            )
        self.corpus, self.sequence_length, self.seed = corpus, sequence_length, seed
        self.name = corpus.name if name is None else name
        self.windows_per_epoch = (corpus.tokens - 1) // sequence_length
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An epoch's document order [documents], window bounds [windows + 1, 2], window order [windows]."""
        if epoch not in self._epochs:
            # The compiled module ships in the wheel.
            from megatron.core.datasets.helpers import build_sample_idx

            documents = keyed_permutation(self.corpus.documents, self.seed, self.name, epoch, "documents")
            documents = documents.astype(np.int32)
            bounds = build_sample_idx(
                self.corpus.document_lengths, documents, self.sequence_length, 1, self.corpus.tokens
            )
            windows = keyed_permutation(len(bounds) - 1, self.seed, self.name, epoch, "windows")
            self._epochs[epoch] = documents, bounds, windows
            # Two are kept: the current one, and its neighbour while a batch crosses their border.
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` (0, 1, ... without end): int64 [sequence_length + 1]."""
        epoch, position = divmod(int(index), self.windows_per_epoch)
        documents, bounds, windows = self._epoch(epoch)
        window = windows[position]
        (first, start), (last, stop) = bounds[window].tolist(), bounds[window + 1].tolist()
        sample = np.empty(self.sequence_length + 1, dtype=np.int64)
        filled = 0
        for place in range(first, last + 1):
            document = int(documents[place])
            begin = start if place == first else 0
            # A window's bound is its last token, which the next window begins with.
            end = stop + 1 if place == last else int(self.corpus.document_lengths[document])
            sample[filled : filled + end - begin] = self.corpus.read(document, begin, end)
            filled += end - begin
        return sample


class Blend:
    """Several samplers mixed by weight; sample i -> (corpus k, its sample j).

    Sample j of corpus k falls due at the time (j + 1/2) / w_k; the blend is all samples in the order of
    their times (Webster's method; ties go to the first corpus). After any number n of samples corpus k has
    given n w_k of them to within about one, as with Megatron's greedy rule, and the order never depends on
    how many samples are asked for. Unlike the greedy rule it needs no pass over samples 0 ... i to answer
    for i, so a late resume is instant.

    Args:
        weights: one number >= 0 per sampler, any sum; None: proportional to the corpora's tokens.

    Raises:
        ConfigurationError: no corpora, another count of weights, a negative or non-finite one, or all zero.
        DataError: corpora of different tokenizers.
    """

    def __init__(self, samplers: Sequence[CorpusSampler], weights: Sequence[float] | None = None) -> None:
        if not samplers:
            raise ConfigurationError("data.paths is empty: give at least one prepared folder")
        if weights is None:
            weights = [sampler.corpus.tokens for sampler in samplers]
        if len(weights) != len(samplers):
            raise ConfigurationError(
                f"data.weights has {len(weights)} numbers for {len(samplers)} data.paths: give one for each"
            )
        for weight in weights:
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigurationError(f"data.weights: {weight} must be a finite number, 0 or more")
        if sum(weights) <= 0:
            raise ConfigurationError(f"data.weights={list(weights)} are all zero: make at least one positive")
        first = samplers[0].corpus
        for sampler in samplers[1:]:
            if sampler.corpus.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise DataError(
                    f"data.paths: '{first.folder}' has tokenizer {first.tokenizer_fingerprint[:12]}, "
                    f"'{sampler.corpus.folder}' has "
                    f"{sampler.corpus.tokenizer_fingerprint[:12]}: prepare both with "
                    "the same --tokenizer"
                )
        self.samplers = list(samplers)
        self.weights = np.asarray(weights, dtype=np.float64) / math.fsum(weights)
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, its sample) of samples block * 65,536 and on."""
        if block not in self._blocks:
            begin, live = block * _BLEND_BLOCK, np.flatnonzero(self.weights)
            # At time t about t samples are due, to within half a sample per corpus. So what is due before
            # `begin - live - 2` lies before this block, and what is due after its end plus as much, behind
            # it.
            margin = len(live) + 2
            due = np.floor(max(0.0, begin - margin) * self.weights[live] + 0.5).astype(np.int64)
            until = np.ceil((begin + _BLEND_BLOCK + margin) * self.weights[live]).astype(np.int64) + 1
            samples = np.concatenate([np.arange(a, b) for a, b in zip(due, until, strict=True)])
            corpora = np.repeat(live, until - due)
            order = np.lexsort((corpora, (samples + 0.5) / self.weights[corpora]))
            order = order[begin - due.sum() :][:_BLEND_BLOCK]
            self._blocks[block] = corpora[order], samples[order]
            while len(self._blocks) > 2:
                self._blocks.popitem(last=False)
        return self._blocks[block]

    def locate(self, index: int) -> tuple[int, int]:
        """(k, j): sample `index` of the blend is sample j of corpus k."""
        if len(self.samplers) == 1:
            return 0, int(index)
        corpora, samples = self._block(int(index) // _BLEND_BLOCK)
        place = int(index) % _BLEND_BLOCK
        return int(corpora[place]), int(samples[place])

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`: int64 [sequence_length + 1]."""
        corpus, sample = self.locate(index)
        return self.samplers[corpus][sample]


def microbatch_ids(
    first_sample: int, micro_index: int, micro_batch_size: int, rank: int, data_parallel_size: int
) -> list[int]:
    """Sample ids of one microbatch of one data-parallel rank.

    A global batch is the samples first_sample ... first_sample + size - 1, dealt out microbatch by
    microbatch and within one rank by rank, so that every layout trains on the same set at each step.
    """
    start = first_sample + (micro_index * data_parallel_size + rank) * micro_batch_size
    return list(range(start, start + micro_batch_size))


def collate(
    rows: np.ndarray,
    eos_id: int,
    reset_positions: bool = False,
    reset_attention: bool = False,
    mask_eod_loss: bool = False,
) -> dict[str, torch.Tensor]:
    """Rows of sequence_length + 1 tokens -> the tensors of a batch.

    Args:
        rows: int64 [b, s + 1].
        reset_positions: count positions from 0 again after each end-of-text.
        reset_attention: add document_ids, from which the model keeps attention within documents.
        mask_eod_loss: no loss where the *input* is end-of-text, that is for predicting the first token of
            an unrelated document (Megatron's eod_mask_loss). Predicting the end-of-text itself is always
            learned.

    Returns:
        tokens, labels, position_ids: int64 [b, s]; loss_mask: float32 [b, s], 1 where the loss
        counts; and with reset_attention document_ids: int64 [b, s], 0 in a row's first document and one
        more after each end-of-text.
    """
    tokens, labels = rows[:, :-1], rows[:, 1:]
    ended = tokens == eos_id
    mask = np.where(ended, np.float32(0), np.float32(1)) if mask_eod_loss else np.ones(tokens.shape, np.float32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if reset_positions:
        starts = np.zeros(tokens.shape, dtype=np.int64)
        starts[:, 1:] = np.where(ended[:, :-1], positions[:, 1:], 0)
        positions = positions - np.maximum.accumulate(starts, axis=1)
    batch = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
    if reset_attention:
        batch["document_ids"] = np.cumsum(ended, axis=1) - ended
    return {name: torch.from_numpy(np.array(value)) for name, value in batch.items()}


class BatchSource:
    """Training batches of a blend. See `collate` for the options and the tensors."""

    def __init__(
        self,
        blend: Blend,
        sequence_length: int,
        reset_positions: bool = False,
        reset_attention: bool = False,
        mask_eod_loss: bool = False,
    ) -> None:
        self.blend, self.sequence_length = blend, sequence_length
        self.eos_id = blend.samplers[0].corpus.eos_id
        self.tokenizer_path = blend.samplers[0].corpus.tokenizer_path
        self.options = {
            "reset_positions": reset_positions,
            "reset_attention": reset_attention,
            "mask_eod_loss": mask_eod_loss,
        }

    def batch(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """The samples `ids` as a batch, row by row; b = len(ids)."""
        return collate(np.stack([self.blend[index] for index in ids]), self.eos_id, **self.options)

    def global_batch(
        self, first_sample: int, size: int, rank: int, data_parallel_size: int, micro_batch_size: int
    ) -> dict[str, torch.Tensor]:
        """A rank's share of a global batch of `size` samples, its microbatches one after the other.

        Raises:
            ConfigurationError: micro_batch_size * data_parallel_size does not divide `size`.
        """
        count, rest = divmod(size, micro_batch_size * data_parallel_size)
        if rest or count == 0:
            nearest = max(1, count) * micro_batch_size * data_parallel_size
            raise ConfigurationError(
                f"data.global_batch_size={size} must be a multiple of "
                f"data.micro_batch_size={micro_batch_size} "
                f"times {data_parallel_size} data-parallel ranks: use {nearest}"
            )
        ids = [
            index
            for micro in range(count)
            for index in microbatch_ids(first_sample, micro, micro_batch_size, rank, data_parallel_size)
        ]
        return self.batch(ids)


class ValidationSet:
    """A split in file order, cut into windows that predict every token but the very first exactly once.

    Window i holds tokens i s ... i s + s of the joined documents (s = sequence_length) and predicts all but
    its first. The last one is padded, with loss_mask 0 on the padding; so is every window from `windows`
    on, which lets ranks with unequal shares run the same number of microbatches.

    bits per byte = summed loss in nats / (ln 2 x bytes). Over a complete pass `bytes` (the text's, from the
    manifest) is the denominator by convention; `predicted_bytes(n)` counts the bytes behind the labels of
    the first n windows, exactly for tokenizers trained here, and is the denominator of a pass cut short.
    Over a complete pass the two differ by the few bytes of the first token.

    Attributes:
        windows, tokens, bytes: windows of the set, and tokens and UTF-8 bytes of the split.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequence_length: int,
        reset_positions: bool = False,
        reset_attention: bool = False,
        mask_eod_loss: bool = False,
    ) -> None:
        if corpus.tokens < 2:
            raise DataError(
                f"data: '{corpus.folder}' ({corpus.split}) has {corpus.tokens} tokens: at least 2 are needed"
            )
        self.corpus, self.sequence_length = corpus, sequence_length
        self.tokens, self.bytes = corpus.tokens, corpus.bytes
        self.windows = -(-(corpus.tokens - 1) // sequence_length)
        self.options = {
            "reset_positions": reset_positions,
            "reset_attention": reset_attention,
            "mask_eod_loss": mask_eod_loss,
        }

    def batch(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Windows `ids` as a batch (see `collate`)."""
        length = self.sequence_length
        rows = np.full((len(ids), length + 1), self.corpus.pad_id, dtype=np.int64)
        valid = np.zeros(len(ids), dtype=np.int64)
        for row, window in enumerate(ids):
            start = min(window * length, self.tokens)
            found = self.corpus.stream(start, min(start + length + 1, self.tokens))
            rows[row, : len(found)] = found
            valid[row] = max(0, len(found) - 1)
        batch = collate(rows, self.corpus.eos_id, **self.options)
        batch["loss_mask"] *= torch.from_numpy(np.arange(length) < valid[:, None])
        return batch

    def predicted_bytes(self, windows: int | None = None) -> int:
        """UTF-8 bytes of text behind the labels of the first `windows` windows; None: of all."""
        stop = self.tokens if windows is None else min(windows * self.sequence_length + 1, self.tokens)
        sizes = Tokenizer(self.corpus.tokenizer_path).token_bytes()
        step = 1 << 22
        parts = (self.corpus.stream(start, min(start + step, stop)) for start in range(1, stop, step))
        return int(sum(sizes[part].sum() for part in parts))


def inspect_batch(source: BatchSource, ids: Sequence[int]) -> list[tuple[int, str, str]]:
    """(sample id, corpus name, decoded text) of samples; an end-of-text shows as "<|eos|>"."""
    tokenizer = Tokenizer(source.tokenizer_path)
    found = []
    for index in ids:
        sampler = source.blend.samplers[source.blend.locate(index)[0]]
        tokens = source.blend[index]
        pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id))
        texts = [tokenizer.decode(piece[piece != tokenizer.eos_id]) for piece in pieces]
        found.append((int(index), sampler.name, "<|eos|>".join(texts)))
    return found
