"""Composition of permutations, from a table of which a part is shown.

Source: arXiv 2605.04396 [REF]. There are 16 keys and 8 random permutations of them; (k, i, j) is answered by p_j(p_i(k)). Seven
tenths of the pairs (i, j) are trained on with every key, the others never.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megagamma.data.text import keyed_permutation
from megagamma.errors import ConfigurationError
from megagamma.toys.contracts import Tokens


@dataclass(frozen=True)
class Permutations:
    """The task, by its options; tokens 0 to keys - 1 are keys, the next are permutations."""

    keys: int = 16
    permutations: int = 8
    share: float = 0.7
    """Of the pairs that are trained on."""

    def __post_init__(self) -> None:
        """Raises: ConfigurationError: there are no such questions."""
        for name in ("keys", "permutations"):
            if getattr(self, name) < 2:
                raise ConfigurationError(f"{name}={getattr(self, name)}: must be at least 2")
        if not 0 < self.trained_pairs < self.permutations**2:
            raise ConfigurationError(
                f"share={self.share}: trains on {self.trained_pairs} of {self.permutations**2} pairs: at least one must be "
                "trained on and one left out"
            )

    @property
    def trained_pairs(self) -> int:
        """Pairs of permutations that are trained on."""
        return round(self.share * self.permutations**2)

    @property
    def length(self) -> int:
        """A key and two permutations."""
        return 3

    @property
    def vocab_size(self) -> int:
        """Keys and permutations."""
        return self.keys + self.permutations

    @property
    def samples(self) -> int:
        """All that is trained on."""
        return self.trained_pairs * self.keys

    def _pairs(self, seed: int, trained: bool) -> Tokens:
        order = keyed_permutation(self.permutations**2, "permutations: pairs", seed)
        return order[: self.trained_pairs] if trained else order[self.trained_pairs :]

    def _all(self, ids: Tokens, seed: int, trained: bool) -> Tokens:
        pair, key = np.divmod(ids, self.keys)
        first, second = np.divmod(self._pairs(seed, trained)[pair], self.permutations)
        return np.stack([key, first + self.keys, second + self.keys], axis=1)

    def train(self, ids: Tokens, seed: int) -> Tokens:
        """Every trained pair with every key."""
        return self._all(ids, seed, True)

    def sets(self) -> dict[str, int]:
        """trained: all that is trained on; held_out: all the others."""
        return {"trained": self.samples, "held_out": self.permutations**2 * self.keys - self.samples}

    def questions(self, name: str, ids: Tokens, seed: int) -> Tokens:
        """Questions of a set."""
        return self._all(ids, seed, name == "trained")

    def answers(self, name: str, tokens: Tokens, seed: int) -> dict[str, Tokens]:
        """The key after both permutations."""
        table = np.stack([keyed_permutation(self.keys, "permutations", seed, i) for i in range(self.permutations)])
        key, first, second = tokens[:, 0], tokens[:, 1] - self.keys, tokens[:, 2] - self.keys
        return {"right": table[second, table[first, key]]}
