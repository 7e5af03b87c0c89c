"""A task that one direction solves, on which weights condense and then query and key lose rank.

Source: arXiv 2510.06954 [PRE]. One anchor a of 1 to 4 stands among keys of 5 to 100; the answer is the key after it, plus 1
where a is odd. Published with embedding and head frozen (`optimizer.lr_factors`), and no decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megagamma.toys.contracts import Tokens, check_questions
from megagamma.toys.draws import integers

ANCHORS, FIRST_KEY, KEYS = 4, 5, 96


@dataclass(frozen=True)
class Condensation:
    """The task, by its options."""

    length: int = 10
    vocab_size: int = 128
    """Published: 201."""
    samples: int = 0
    test_samples: int = 1000

    def __post_init__(self) -> None:
        """Raises: ConfigurationError: there are no such questions."""
        check_questions(self.length, 2, "an anchor and a key", self.vocab_size, FIRST_KEY + KEYS)

    def _build(self, ids: Tokens, seed: int, name: str) -> Tokens:
        drawn = integers(ids, [self.length - 1, ANCHORS, *[KEYS] * self.length], seed, f"condensation {name}")
        tokens = drawn[:, 2:] + FIRST_KEY
        tokens[np.arange(len(ids)), drawn[:, 0]] = drawn[:, 1] + 1
        return tokens

    def train(self, ids: Tokens, seed: int) -> Tokens:
        """Every question can come."""
        return self._build(ids, seed, "train")

    def sets(self) -> dict[str, int]:
        """test: drawn apart from those of training."""
        return {"test": self.test_samples}

    def questions(self, name: str, ids: Tokens, seed: int) -> Tokens:
        """Questions of a set."""
        return self._build(ids, seed, name)

    def answers(self, name: str, tokens: Tokens, seed: int) -> dict[str, Tokens]:
        """The key after the anchor, one higher after an odd one."""
        rows = np.arange(len(tokens))
        place = (tokens < FIRST_KEY).argmax(1)
        return {"right": tokens[rows, place + 1] + tokens[rows, place] % 2}
