"""Greedy decoding, of any model that gives the next token of some rows of tokens. Plain Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

NextTokens = Callable[[list[list[int]]], Sequence[int]]
"""Rows of tokens, of any lengths -> the most likely token after each."""


def greedy_continuations(
    next_tokens: NextTokens,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    eos: int | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue prompts together, one call of `next_tokens` for every token of the longest.

    Args:
        next_tokens: gets only the rows that are not complete yet, prompt included, in the order of the prompts.
        prompts: token ids.
        limits: for each prompt, the tokens to add at most.
        eos: ends a continuation, and is no part of it; None: no token does.
        stop: given a prompt's index and its continuation so far, whether it is complete; the tokens so far stay.

    Returns:
        The tokens added to each prompt.
    """
    rows = [list(prompt) for prompt in prompts]
    continuations: list[list[int]] = [[] for _ in rows]
    unfinished = [index for index, limit in enumerate(limits) if limit > 0]
    while unfinished:
        tokens = next_tokens([rows[index] for index in unfinished])
        continued = []
        for index, token in zip(unfinished, tokens, strict=True):
            if token == eos:
                continue
            rows[index].append(token)
            continuations[index].append(token)
            complete = len(continuations[index]) >= limits[index]
            if not complete and not (stop is not None and stop(index, continuations[index])):
                continued.append(index)
        unfinished = continued
    return continuations
