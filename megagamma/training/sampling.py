"""Short greedy continuations, to look at what a model has learned."""

from __future__ import annotations

import torch

from megagamma.data.tokenizer import Tokenizer
from megagamma.distributed.engine import Engine


def continue_text(engine: Engine, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """Greedy continuation of a prompt; all ranks call it and get the same text.

    Each token costs a forward pass over the whole window: there is no key-value cache, since this runs seldom and on
    any layout.

    Args:
        prompt: text to continue; cut on the left to leave room in the model's window.
        count: tokens to add, fewer when the model ends the document.
    """
    length = engine.config.data.sequence_length
    known = tokenizer.encode(prompt)[-max(1, length - count) :] or [tokenizer.eos_id]
    first = len(known)
    window = torch.full((1, length), tokenizer.pad_id, dtype=torch.int64)
    while len(known) < min(length, first + count):
        window[0, : len(known)] = torch.tensor(known)
        token = engine.next_token(window, len(known) - 1)
        if token == tokenizer.eos_id:
            break
        known.append(token)
    return tokenizer.decode([token for token in known[first:] if token < tokenizer.vocab_size])
