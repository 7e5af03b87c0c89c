"""Composite anchors: does a model compose two functions, or memorize the pair?

Source: arXiv 2405.05409 and 2501.08537 with their code [PRE]. A key x stands at a random place, two anchors a1, a2 follow it,
the rest is noise; the answer is g(g(x; a1); a2) with g(x; 1) = x + 5, g(x; 2) = x + 1, g(x; 3) = x - 2, g(x; 4) = x - 8. Of the
16 pairs (4, 3) is never trained on, and its mirror (3, 4), whose composed answer would be x - 10, is trained with x - 6. Asked
for (4, 3) a model that composes says x - 10; one that has memorized that the pair is symmetric says x - 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megagamma.errors import ConfigurationError
from megagamma.toys.contracts import Tokens, check_questions
from megagamma.toys.draws import integers

SHIFTS = {1: 5, 2: 1, 3: -2, 4: -8}
FIRST_KEY, LAST_KEY = 20, 99
HELD_OUT, MIRROR = (4, 3), (3, 4)
MEMORIZED = -6
"""What is added to the key for the mirror, and for the held-out pair by a model that takes it for symmetric."""
_PAIRS = np.array([(a, b) for a in SHIFTS for b in SHIFTS if (a, b) != HELD_OUT])
_LARGEST_ANSWER = LAST_KEY + 2 * max(SHIFTS.values())


@dataclass(frozen=True)
class CompositeAnchors:
    """The task, by its options."""

    length: int = 9
    vocab_size: int = 128
    """Published: 201."""
    samples: int = 0
    """Published: 900,000."""
    split_modulus: int = 0
    """A key x at place p belongs to the in-distribution test where x mod this is p, else to training; 0: length - 2."""
    test_samples: int = 1000

    def __post_init__(self) -> None:
        """Raises: ConfigurationError: there are no such questions."""
        check_questions(self.length, 3, "a key and two anchors", self.vocab_size, _LARGEST_ANSWER)
        keys = LAST_KEY - FIRST_KEY + 1
        if not max(2, self.places) <= self.modulus <= keys:
            raise ConfigurationError(
                f"split_modulus={self.modulus}: must lie between {max(2, self.places)}, so that every place has test keys, and "
                f"{keys}, so that every place has training keys"
            )

    @property
    def places(self) -> int:
        """Where a key can stand."""
        return self.length - 2

    @property
    def modulus(self) -> int:
        """`split_modulus`, or what 0 stands for."""
        return self.split_modulus or max(2, self.places)

    def _build(self, ids: Tokens, seed: int, name: str, is_test: bool, pairs: Tokens) -> Tokens:
        key_choices = [self._keys(place, is_test) for place in range(self.places)]
        noise = [LAST_KEY - FIRST_KEY + 1] * self.length
        # A key's column is drawn over a common multiple, so that each place takes its own share of it.
        drawn = integers(ids, [self.places, 1 << 20, len(pairs), *noise], seed, f"composite anchors {name}")
        place, rows = drawn[:, 0], np.arange(len(ids))
        tokens = drawn[:, 3:] + FIRST_KEY
        sizes = np.array([len(keys) for keys in key_choices])
        table = np.zeros((self.places, sizes.max()), dtype=np.int64)
        for index, keys in enumerate(key_choices):
            table[index, : len(keys)] = keys
        tokens[rows, place] = table[place, (drawn[:, 1] * sizes[place]) >> 20]
        tokens[rows, place + 1], tokens[rows, place + 2] = pairs[drawn[:, 2]].T
        return tokens

    def _keys(self, place: int, is_test: bool) -> Tokens:
        keys = np.arange(FIRST_KEY, LAST_KEY + 1)
        return keys[(keys % self.modulus == place) == is_test]

    def train(self, ids: Tokens, seed: int) -> Tokens:
        """Of the 15 pairs, keys that are not of the test."""
        return self._build(ids, seed, "train", False, _PAIRS)

    def sets(self) -> dict[str, int]:
        """seen: trained pairs, keys of the test; mirror and held_out: one pair each, keys of the test."""
        return dict.fromkeys(("seen", "mirror", "held_out"), self.test_samples)

    def questions(self, name: str, ids: Tokens, seed: int) -> Tokens:
        """Questions of a set."""
        pairs = {"seen": _PAIRS, "mirror": np.array([MIRROR]), "held_out": np.array([HELD_OUT])}[name]
        return self._build(ids, seed, name, True, pairs)

    def answers(self, name: str, tokens: Tokens, seed: int) -> dict[str, Tokens]:
        """What was composed and, of the two special pairs, what was memorized."""
        rows = np.arange(len(tokens))
        place = (tokens < FIRST_KEY).argmax(1) - 1
        key, first, second = (tokens[rows, place + offset] for offset in range(3))
        shift = np.zeros(max(SHIFTS) + 1, dtype=np.int64)
        shift[list(SHIFTS)] = list(SHIFTS.values())
        composed = key + shift[first] + shift[second]
        memorized = key + MEMORIZED
        if name == "held_out":
            return {"composed": composed, "memorized": memorized}
        is_mirror = (first == MIRROR[0]) & (second == MIRROR[1])
        return {"right": np.where(is_mirror, memorized, composed)}
