"""What the tensors of a foreign model hold: boxes of logical matrices, constants, or what stays as it is.

Logical names follow the Hugging Face Llama convention, whatever the model calls its tensors: a seed and a shape then give
the same bits in any class and framework.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megagamma.config.schema import ROLES
from megagamma.model.parameters import LogicalParameter

FOREIGN_ROLES = (
    "position", "router", "expert_gate", "expert_up", "expert_down", "shared_gate", "shared_up", "shared_down",
)  # fmt: skip
"""Roles of matrices that this project's own model does not have: position embedding, and a mixture of experts."""
MATRIX_ROLES = (*(role for role in ROLES if role != "norm"), *FOREIGN_ROLES)

Box = tuple[tuple[int, int], ...]
"""First and past-last index by axis."""


@dataclass(frozen=True)
class Block:
    """A rectangle of a logical matrix inside one whole tensor of a model."""

    logical: LogicalParameter
    """Shape (out, in), as torch.nn.Linear has it."""
    start: tuple[int, int]
    """Its first element in the logical matrix."""
    box: Box
    """Where it lies in the tensor; but for the last two, every axis has one index."""
    transposed: bool = False
    """The tensor has (in, out), as transformers' Conv1D."""


@dataclass(frozen=True)
class Constant:
    """A bias (0), or a gain at the identity of its norm: 1, or 0 where the norm multiplies by 1 + gain."""

    value: float
    role: str
    """`bias` or `norm`."""


@dataclass(frozen=True)
class Kept:
    """Stays as the model's own code has set it."""

    reason: str


Entry = tuple[Block, ...] | Constant | Kept


@dataclass
class Plan:
    """What a model is made of."""

    hidden_size: int
    num_layers: int
    entries: dict[str, Entry]
    """By the name of a parameter, in the model's order."""
    epsilon: float | None = None
    """Of its norms, by its config; None: not known."""
    qk_norm: bool = False
    input_scale: float = 1.0
    """What the model multiplies its embeddings with."""

    def logical(self) -> dict[str, LogicalParameter]:
        """Every logical matrix by its name, in order."""
        found: dict[str, LogicalParameter] = {}
        for entry in self.entries.values():
            if isinstance(entry, tuple):
                found.update((block.logical.name, block.logical) for block in entry)
        return found

    def of(self, logical: Mapping[str, LogicalParameter]) -> Plan:
        """A plan of the same model that holds these matrices whole."""
        return dataclasses.replace(
            self, entries={name: whole(name, one.role, one.shape) for name, one in logical.items()}
        )


def whole(name: str, role: str, shape: tuple[int, ...], transposed: bool = False) -> tuple[Block, ...]:
    """The entry of a tensor that is one logical matrix. `shape` is the tensor's."""
    size = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    return (Block(LogicalParameter(name, role, size, None), (0, 0), tuple((0, n) for n in shape), transposed),)


def fused(
    parts: Iterable[tuple[str, str, int]], shape: tuple[int, ...], repeats: int = 1, transposed: bool = False
) -> tuple[Block, ...]:
    """The entry of a tensor that holds several matrices side by side along their output axis.

    Args:
        parts: (logical name, role, rows) of each within one repeat.
        shape: of the tensor.
        repeats: how often the pattern of parts comes, such as once for each head.
        transposed: the tensor has (in, out).

    Raises:
        ValueError: the parts do not make up the tensor.
    """
    parts = list(parts)
    total, inputs = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    if sum(rows for *_, rows in parts) * repeats != total:
        raise ValueError(f"{repeats} x {[rows for *_, rows in parts]} rows do not make up {total}")
    blocks, first = [], 0
    for repeat in range(repeats):
        for name, role, rows in parts:
            logical = LogicalParameter(name, role, (rows * repeats, inputs), None)
            across, along = (first, first + rows), (0, inputs)
            box = (along, across) if transposed else (across, along)
            blocks.append(Block(logical, (repeat * rows, 0), box, transposed))
            first += rows
    return tuple(blocks)


Shapes = Mapping[str, tuple[int, ...]]
"""Whole shapes by parameter name."""
