"""Short greedy continuations, to look at what a model has learned."""

from __future__ import annotations

import torch

from megagamma.data.tokenizer import Tokenizer
from megagamma.distributed.engine import Engine
from megagamma.model.decoding import greedy_continuations


def continue_text(engine: Engine, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """Greedy continuation of a prompt; all ranks call it and get the same text.

    Each token costs a forward pass over the whole sequence length: there is no key-value cache, since this runs
    seldom and on any layout.

    Args:
        prompt: text to continue; cut on the left to leave room in the sequence length.
        count: tokens to add, fewer when the model ends the document.
    """
    length = engine.config.data.sequence_length
    prompt_ids = tokenizer.encode(prompt)[-max(1, length - count) :] or [tokenizer.eos_id]
    padded = torch.full((1, length), tokenizer.pad_id, dtype=torch.int64)

    def next_tokens(rows: list[list[int]]) -> list[int]:
        padded[0, : len(rows[0])] = torch.tensor(rows[0])
        return [engine.next_token(padded, len(rows[0]) - 1)]

    limit = min(count, length - len(prompt_ids))
    tokens = greedy_continuations(next_tokens, [prompt_ids], [limit], tokenizer.eos_id)[0]
    return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size])
