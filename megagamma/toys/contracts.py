"""What a toy is: questions of one length whose last token is to be predicted, and sets of them that tell answers apart."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megagamma.errors import ConfigurationError

Tokens = NDArray[np.int64]
"""[n, length], the questions; or [n], one token each."""


class Toy(Protocol):
    """A task. Question i of a set is a pure function of the set, the seed and i."""

    length: int
    """Tokens of a question."""
    vocab_size: int
    samples: int
    """Questions of the training set, which is gone through in another order every time; 0: it never ends."""

    def train(self, ids: Tokens, seed: int) -> Tokens:
        """Training questions, [n, length]."""
        ...

    def sets(self) -> dict[str, int]:
        """Sets of questions to score the model on, and their sizes."""
        ...

    def questions(self, name: str, ids: Tokens, seed: int) -> Tokens:
        """Questions of a set, [n, length]."""
        ...

    def answers(self, name: str, tokens: Tokens, seed: int) -> dict[str, Tokens]:
        """Named answers to questions of a set ("train" is that of training), [n] each. The first is the label."""
        ...


def check_questions(length: int, least_length: int, parts: str, vocab_size: int, largest_answer: int) -> None:
    """Refuse a length or a vocabulary in which a toy's questions or answers have no room.

    Raises:
        ConfigurationError: naming the option.
    """
    if length < least_length:
        raise ConfigurationError(f"length={length}: must be at least {least_length}: {parts}")
    if vocab_size <= largest_answer:
        raise ConfigurationError(
            f"vocab_size={vocab_size}: must be at least {largest_answer + 1}: answers reach {largest_answer}"
        )
