"""Training a SentencePiece tokenizer on a sample of a source.

The settings make the tokenizer lossless and convertible to a Hugging Face tokenizer: BPE with byte fallback, identity
normalization, spaces kept as they are, no dummy prefix, digits one by one, and control pieces that no text contains.
"""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megagamma.data.preparation.corpus import read_documents
from megagamma.data.preparation.source import Shard, Source
from megagamma.data.tokenizer import CONTROL_PIECES, Tokenizer
from megagamma.errors import ConfigurationError, DataError

SAMPLE_CHARACTERS = 20_000_000
_CHUNK = 2048  # characters of a training sentence; at most 8,192 bytes
_SAMPLED_SHARDS = 256


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
