"""SentencePiece tokenizers: train one on a sample of a source, or load one.

The settings make the tokenizer lossless and convertible to a Hugging Face tokenizer: BPE with byte
fallback, identity normalization, spaces kept as they are, no dummy prefix, digits one by one, and control
pieces that no text contains."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megagamma.data.corpus import Shard, Source, read_documents
from megagamma.errors import ConfigurationError, DataError

CONTROL_PIECES = ("<|unk|>", "<|bos|>", "<|eos|>", "<|pad|>")
SAMPLE_CHARACTERS = 20_000_000
_SPACE = "\u2581"  # SentencePiece's stand-in for a space
_CHUNK = 2048  # characters of a training sentence; at most 8,192 bytes
_SAMPLED_SHARDS = 256


class Tokenizer:
    """A SentencePiece model file.

    Attributes:
        path: the .model file.
        vocab_size: number of pieces, control pieces included.
        bos_id, eos_id, pad_id: ids of the control pieces. Where a foreign model has no padding piece,
            pad_id is eos_id; where it has no beginning-of-text piece, bos_id is -1.
        fingerprint: sha256 of the model file, hexadecimal.

    Raises:
        DataError: the file is missing, is not a SentencePiece model, or has no end-of-text piece.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self.path = str(path)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"tokenizer: '{path}' cannot be read ({error.strerror}): give a SentencePiece .model file"
            ) from error
        if not data:
            raise DataError(f"tokenizer: '{path}' is empty (0 bytes): give a SentencePiece .model file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size = self._model.get_piece_size()
        except RuntimeError as error:
            raise DataError(
                f"tokenizer: '{path}' is not a SentencePiece model ({len(data):,} bytes): give a .model file"
            ) from error
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if self.eos_id < 0:
            raise DataError(
                f"tokenizer: '{path}' has no end-of-text piece, which separates documents: "
                "use a model trained with one (eos_id >= 0)"
            )
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        fallback = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = fallback if all(self._model.is_byte(index) for index in fallback) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without control pieces."""
        if self._space_ids is None or _SPACE not in text:
            return self._model.encode(text)
        # SentencePiece would read this character as a space; its bytes are kept apart so that decoding
        # restores it.
        ids: list[int] = []
        for index, piece in enumerate(text.split(_SPACE)):
            if index:
                ids.extend(self._space_ids)
            ids.extend(self._model.encode(piece))
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids. Control pieces give nothing; bytes that are not UTF-8 give U+FFFD."""
        return self._model.decode([int(index) for index in ids])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text behind each token id: int64 [vocab_size], 0 for control pieces.

        Summed over the tokens of a document it is the document's length in bytes, for tokenizers trained
        here."""
        model = self._model
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for index in range(self.vocab_size):
            if model.is_byte(index):
                sizes[index] = 1
            elif not (model.is_control(index) or model.is_unknown(index)):
                sizes[index] = len(model.id_to_piece(index).replace(_SPACE, " ").encode())
        return sizes


def train_tokenizer(
    shards: Sequence[Shard],
    source: Source,
    vocab_size: int,
    path: str | Path,
    seed: int = 1234,
    sample_characters: int = SAMPLE_CHARACTERS,
) -> Tokenizer:
    """Train a BPE tokenizer of `vocab_size` pieces on a sample of a source; write it to `path` atomically.

    The same shards, seed and limit give the same file, byte for byte.

    Args:
        shards: what `list_shards(source)` gave, or part of it.
        vocab_size: pieces, of which 4 are control pieces and 256 are bytes.
        sample_characters: characters of text to train on at most; see `sample_text` for how they are
            chosen.

    Raises:
        ConfigurationError: a vocabulary that is too small for the characters, or too large for the text.
        DataError: no text at all.
    """
    import sentencepiece

    # A list and not a generator: an exception raised inside SentencePiece's reader would not survive the
    # way back.
    sample = list(sample_text(shards, source, seed, sample_characters))
    if not any(chunk.strip() for chunk in sample):
        raise DataError("tokenizer: the source holds no text to train on: check inputs and text_field")
    model = io.BytesIO()
    pieces: dict[str, Any] = {f"{piece[2:-2]}_piece": piece for piece in CONTROL_PIECES}
    pieces.update({f"{piece[2:-2]}_id": index for index, piece in enumerate(CONTROL_PIECES)})
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _CHUNK,
            num_threads=1,  # the number is stored in the file, so a free choice would change its fingerprint
            minloglevel=2,
            **pieces,
        )
    except RuntimeError as error:
        raise _explain(error, vocab_size, sum(map(len, sample))) from error
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(model.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return Tokenizer(path)


def sample_text(shards: Sequence[Shard], source: Source, seed: int, limit: int) -> Iterator[str]:
    """Yield chunks of text, at most `limit` characters in all; everything when the source is smaller.

    Of many shards, 256 are drawn. Shards share the limit equally, and what a small one leaves over goes to
    the larger ones; within a shard every chunk has the same chance. A compressed file is read only until
    its share is full."""
    generator = random.Random(f"{seed}/tokenizer")
    chosen = list(shards)
    if len(chosen) > _SAMPLED_SHARDS:
        order = sorted(range(len(chosen)), key=lambda index: (generator.random(), index))
        chosen = [chosen[index] for index in sorted(order[:_SAMPLED_SHARDS])]
    left = limit
    for position, shard in enumerate(sorted(chosen, key=lambda shard: shard.size)):
        share = left // (len(chosen) - position)
        probability = 1.0 if shard.size <= share else share / shard.size
        taken = 0
        for document in read_documents(shard, source):
            for chunk in _chunks(document):
                if probability < 1.0 and generator.random() >= probability:
                    continue
                chunk = chunk[: share - taken]
                taken += len(chunk)
                yield chunk
                if taken >= share:
                    break
            if taken >= share:
                break
        left -= min(taken, left)


def _chunks(text: str) -> Iterable[str]:
    """Cut a text before spaces into chunks of at most 2,048 characters, so that few words are cut."""
    start = 0
    while start < len(text):
        stop = min(start + _CHUNK, len(text))
        if stop < len(text):
            space = text.rfind(" ", start + 1, stop)
            stop = space if space > start else stop
        yield text[start:stop]
        start = stop


def _explain(error: RuntimeError, vocab_size: int, characters: int) -> ConfigurationError:
    text = str(error)
    if found := re.search(r"value <= (\d+)", text):
        return ConfigurationError(
            f"vocab_size={vocab_size} is too large for {characters:,} characters of text: "
            f"use {found[1]} or less, or give more text"
        )
    if found := re.search(r"required_chars\. (\d+) vs (\d+)", text):
        return ConfigurationError(
            f"vocab_size={vocab_size} is too small: 256 bytes, 4 control pieces and the "
            "characters of this text "
            f"need {found[2]}: use {found[2]} or more"
        )
    return ConfigurationError(f"vocab_size={vocab_size}: SentencePiece refuses it ({text}): use another size")
