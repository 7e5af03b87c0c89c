"""Token files to sequences: which sequence of a corpus is number i.

Sample i of a training run is a pure function of (prepared folders, weights, sequence length, seed, i). It depends neither
on the number of steps, nor on the layout, nor on the process that asks. So a run resumes by its sample counter alone, and
every layout sees the same global batch.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from megagamma.data.preparation.indexing import verify_prepared
from megagamma.errors import ConfigurationError, DataError


class Corpus:
    """One split of a prepared folder, memory-mapped through Megatron's IndexedDataset.

    Attributes:
        name: the folder's last component, which names the corpus in reports.
        documents, tokens, bytes: of this split; tokens count one eos per document, bytes the UTF-8
            text.
        document_lengths: int32 [documents], in tokens, eos included.
        vocab_size, eos_id, pad_id, tokenizer_path, tokenizer_fingerprint: of the tokenizer that made it.

    Raises:
        DataError: whatever `verify_prepared` finds, or a split that the folder does not have.
    """

    def __init__(self, folder: str | Path, split: str = "train", manifest: dict | None = None) -> None:
        """Args: manifest: what `verify_prepared` returned, where the folder has just been checked."""
        manifest = manifest or verify_prepared(folder)
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

    def is_valid(self, tokens: np.ndarray) -> bool:
        """Whether all ids are in the vocabulary."""
        return len(tokens) == 0 or (int(tokens.max()) < self.vocab_size and int(tokens.min()) >= 0)

    def refuse(self, tokens: np.ndarray, document: int) -> None:
        """Refuse tokens of a document when an id is not in the vocabulary.

        Raises:
            DataError: naming the file, the document and the id.
        """
        if not self.is_valid(tokens):
            wrong = tokens[(tokens >= self.vocab_size) | (tokens < 0)][0]
            error = DataError(
                f"data: '{self.dataset.path_prefix}.bin': document {document:,} has token id {int(wrong)}, the vocabulary has "
                f"0 to {self.vocab_size - 1}: the file is corrupt: `tools/prepare_data.py --verify {self.folder}` checks it"
            )
            error.on_one_rank = True  # other ranks read other samples
            raise error


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
        """Sample `index` (0, 1, ... without end): int64 [sequence_length + 1].

        Raises:
            DataError: an id is not in the vocabulary; names the file and the document.
        """
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
        if not self.corpus.is_valid(sample):
            for document in documents[first : last + 1].tolist():
                length = int(self.corpus.document_lengths[document])
                self.corpus.refuse(self.corpus.read(document, 0, length), document)
        return sample
