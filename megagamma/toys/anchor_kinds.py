"""Reasoning against memory: two kinds of anchors in one task, of which one can be computed, the other only be memorized.

Source: arXiv 2502.04375 [PRE]. A key z of 21 to 120 stands at a random place, two anchors of one kind follow, the rest is
noise. Of reasoning anchors, 11 to 20, the answer is z + a1 + a2; of memory anchors, 1 to 10, it is a label of 21 to 120 that
was drawn once for each (z, a1, a2). The reasoning pairs (11, 13) and (13, 11) are never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megagamma.toys.contracts import Tokens, check_questions
from megagamma.toys.draws import integers

FIRST_KEY, KEYS = 21, 100
ANCHORS = 10
"""Of each kind: memory 1 to 10, reasoning 11 to 20."""
HELD_OUT = ((11, 13), (13, 11))
_REASONING = np.array([(a, b) for a in range(11, 21) for b in range(11, 21) if (a, b) not in HELD_OUT], dtype=np.int64)
_MEMORY = np.array([(a, b) for a in range(1, 11) for b in range(1, 11)], dtype=np.int64)
_LARGEST_ANSWER = FIRST_KEY + KEYS - 1 + 2 * 20


@dataclass(frozen=True)
class AnchorKinds:
    """The task, by its options."""

    length: int = 9
    vocab_size: int = 192
    samples: int = 0
    """Published: 200,000."""
    test_samples: int = 1000

    def __post_init__(self) -> None:
        """Raises: ConfigurationError: there are no such questions."""
        check_questions(self.length, 3, "a key and two anchors", self.vocab_size, _LARGEST_ANSWER)

    def _build(self, ids: Tokens, seed: int, name: str, kinds: tuple[Tokens, ...]) -> Tokens:
        limits = [self.length - 2, len(kinds), *(len(pairs) for pairs in kinds), *[KEYS] * self.length]
        drawn = integers(ids, limits, seed, f"anchor kinds {name}")
        place, kind, rows = drawn[:, 0], drawn[:, 1], np.arange(len(ids))
        tokens = drawn[:, 2 + len(kinds) :] + FIRST_KEY
        for index, pairs in enumerate(kinds):
            chosen = kind == index
            first, second = pairs[drawn[chosen, 2 + index]].T
            tokens[rows[chosen], place[chosen] + 1], tokens[rows[chosen], place[chosen] + 2] = first, second
        return tokens

    def train(self, ids: Tokens, seed: int) -> Tokens:
        """Half of each kind."""
        return self._build(ids, seed, "train", (_MEMORY, _REASONING))

    def sets(self) -> dict[str, int]:
        """memory and reasoning: as in training; held_out: the reasoning pairs that are never trained on."""
        return dict.fromkeys(("memory", "reasoning", "held_out"), self.test_samples)

    def questions(self, name: str, ids: Tokens, seed: int) -> Tokens:
        """Questions of a set."""
        pairs = {"memory": _MEMORY, "reasoning": _REASONING, "held_out": np.array(HELD_OUT)}[name]
        return self._build(ids, seed, name, (pairs,))

    def answers(self, name: str, tokens: Tokens, seed: int) -> dict[str, Tokens]:
        """The sum, or the label that was drawn."""
        rows = np.arange(len(tokens))
        place = (tokens < FIRST_KEY).argmax(1) - 1
        key, first, second = (tokens[rows, place + offset] for offset in range(3))
        number = ((key - FIRST_KEY) * ANCHORS + first - 1) * ANCHORS + second - 1
        drawn = integers(np.maximum(number, 0), [KEYS], seed, "anchor kinds labels")[:, 0] + FIRST_KEY
        return {"right": np.where(first > ANCHORS, key + first + second, drawn)}
