"""Short greedy continuations, to look at what a model has learned."""

from __future__ import annotations

import torch

from megagamma.config.schema import LoggingConfig
from megagamma.data.contracts import Batch, TextCodec
from megagamma.distributed.engine import Engine
from megagamma.model.decoding import greedy_continuations
from megagamma.training.callbacks.base import Callback, Step


class Samples(Callback):
    """Writes a text sample every `logging.sample_interval` steps, and after the last one."""

    def __init__(self, logging: LoggingConfig) -> None:
        self.logging = logging

    def after_step(self, step: Step) -> None:
        """Sample when it is due."""
        interval = self.logging.sample_interval
        if interval and step.number % interval == 0 and not step.is_last:
            self._sample()

    def end(self) -> None:
        """Sample from the trained model."""
        self._sample()

    def _sample(self) -> None:
        codec, logging = self.session.data.codec, self.logging
        if logging.sample_tokens and codec is not None:
            text = continue_text(self.engine, codec, logging.sample_prompt, logging.sample_tokens)
            self.session.reporter.sample(self.session.step, logging.sample_prompt, text)


def next_token(engine: Engine, tokens: torch.Tensor, position: int) -> int:
    """The most likely token after `position`, the same on every rank; every rank calls this.

    Args:
        tokens: int64 [1, s] on the CPU, the same on every rank.
        position: index of the last token that is given.
    """
    batch = Batch(tokens, tokens, torch.ones(tokens.shape), torch.arange(tokens.shape[1]).unsqueeze(0))
    # The interleaved schedule runs a multiple of the number of stages.
    count = engine.pipeline if len(engine.chunks) > 1 else 1
    return int(engine.token_scores([batch] * count)[0, 0, 0, position, 1])


def continue_text(engine: Engine, codec: TextCodec, prompt: str, count: int) -> str:
    """Greedy continuation of a prompt; all ranks call it and get the same text.

    Each token costs a forward pass over the whole context: there is no key-value cache, since this runs seldom and on
    any layout.

    Args:
        prompt: text to continue; cut on the left to leave room in the model's context.
        count: tokens to add, fewer when the model ends the document.
    """
    length = engine.config.data.sequence_length
    prompt_ids = codec.encode(prompt)[-max(1, length - count) :] or [codec.eos_id]
    padded = torch.full((1, length), codec.pad_id, dtype=torch.int64)

    def next_tokens(rows: list[list[int]]) -> list[int]:
        padded[0, : len(rows[0])] = torch.tensor(rows[0])
        return [next_token(engine, padded, len(rows[0]) - 1)]

    limit = min(count, length - len(prompt_ids))
    tokens = greedy_continuations(next_tokens, [prompt_ids], [limit], codec.eos_id)[0]
    return codec.decode([token for token in tokens if token < codec.vocab_size])
