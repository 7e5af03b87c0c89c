"""Bounds that the schema gives beside an option."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """Values that a number may take. Infinity and NaN are never allowed."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    rule: str = ""
    """The bounds in words, where those below do not say enough."""
    limit: float = 1e15
    """Largest value where nothing else bounds it: beyond any run, so that no mistake makes a loop or a buffer of that size."""

    def allow(self, value: float) -> bool:
        """Whether a value is within the bounds."""
        return (
            not self.exceeded(value)
            and math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def exceeded(self, value: float) -> bool:
        """Whether a value is beyond the limit, which the rule in words does not name."""
        return self.maximum is None and self.below is None and self.limit < value < math.inf

    def __str__(self) -> str:
        """The rule, to follow the option's name and value: "must be at least 1"."""
        if self.rule:
            return self.rule
        if self.maximum is not None or self.below is not None:
            top = f"{self.maximum:g}" if self.below is None else f"{self.below:g} excluded"
            return f"must lie between {self.minimum:g} and {top}"
        return f"must be at least {self.minimum:g}" if self.above is None else f"must be more than {self.above:g}"


def option(default: Any, **bounds: Any) -> Any:
    """A field of the schema: its default, and the `Bounds` of its value, or of each of its elements."""
    metadata = {"bounds": Bounds(**bounds)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
