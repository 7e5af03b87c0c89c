"""Rules of a table of roles: a pattern for the whole name of a parameter, and what its tensor is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megagamma.adapters.blocks import Constant, Entry, Kept, Shapes, whole
from megagamma.errors import InitializationError

Settings = Mapping[str, Any]
"""Values of a model's config."""


class Found:
    """A parameter that a rule has matched."""

    def __init__(self, match: re.Match[str], shape: tuple[int, ...], settings: Settings) -> None:
        self.match, self.shape, self.settings = match, shape, settings

    @property
    def layer(self) -> str:
        """Prefix of the layer's logical names; the pattern has a group `layer`."""
        return f"model.layers.{self.match['layer']}"


Rule = tuple[str, Callable[[Found], Entry]]


def layer_matrix(name: str, role: str, transposed: bool = False) -> Callable[[Found], Entry]:
    """A matrix of a layer by its logical name, without prefix and `.weight`."""
    return lambda found: whole(f"{found.layer}.{name}.weight", role, found.shape, transposed)


def matrix(name: str, role: str) -> Callable[[Found], Entry]:
    """A matrix outside of the layers by its logical name."""
    return lambda found: whole(name, role, found.shape)


def by_group(names: Mapping[str, tuple[str, str]], group: str = "short") -> Callable[[Found], Entry]:
    """A matrix of a layer by what the pattern's group says: {text: (logical name, role)}."""

    def entry(found: Found) -> Entry:
        name, role = names[found.match[group]]
        return whole(f"{found.layer}.{name}.weight", role, found.shape)

    return entry


def gain(value: float = 1.0) -> Callable[[Found], Entry]:
    """A norm's gain, and its value at the identity."""
    return lambda _: Constant(value, "norm")


def kept(reason: str) -> Callable[[Found], Entry]:
    """What stays as the model's own code has set it."""
    return lambda _: Kept(reason)


def zero(_: Found) -> Entry:
    """A bias."""
    return Constant(0.0, "bias")


EMBEDDING = matrix("model.embed_tokens.weight", "embedding")
HEAD = matrix("lm_head.weight", "head")
PROJECTIONS = {
    "q": ("self_attn.q_proj", "query"),
    "k": ("self_attn.k_proj", "key"),
    "v": ("self_attn.v_proj", "value"),
    "o": ("self_attn.o_proj", "attention_output"),
}
MLP = {
    "gate": ("mlp.gate_proj", "mlp_gate"),
    "up": ("mlp.up_proj", "mlp_up"),
    "down": ("mlp.down_proj", "mlp_down"),
}


def entries_by_rule(rules: Sequence[Rule], shapes: Shapes, settings: Settings, what: str) -> dict[str, Entry]:
    """The entry of every parameter that a rule matches; the first rule that does holds.

    Args:
        what: whose table it is, for messages.

    Raises:
        InitializationError: a tensor's shape does not fit the config.
    """
    entries: dict[str, Entry] = {}
    for name, shape in shapes.items():
        for pattern, entry in rules:
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            try:
                entries[name] = entry(Found(match, shape, settings))
            except (ValueError, IndexError, KeyError) as error:
                raise InitializationError(
                    f"{name}: shape {shape} is not that of a {what} of its config: {error}"
                ) from error
            break
    return entries
