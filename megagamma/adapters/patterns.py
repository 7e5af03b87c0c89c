"""Roles that the user gives, by patterns for names; and tables by name of libraries that have no classes of their own."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from megagamma.adapters.blocks import MATRIX_ROLES, Constant, Entry, Kept, Shapes, fused, whole
from megagamma.errors import InitializationError

Role = str | Sequence[str] | Sequence[tuple[str, int]]
"""A role; several for a tensor that holds equal parts of them along its output axis; or (role, rows) of unequal parts."""

_CONSTANTS: dict[str, Entry] = {
    "norm": Constant(1.0, "norm"),
    "zero_centred_norm": Constant(0.0, "norm"),
    "bias": Constant(0.0, "bias"),
    "keep": Kept("as the given roles say"),
}
TRANSPOSED = ":in,out"
"""End of a role whose tensor has (in, out) in place of torch.nn.Linear's (out, in)."""


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def check_roles(roles: Mapping[str, Role]) -> None:
    """Refuse what is no role, before anything is looked at.

    Raises:
        InitializationError: naming the pattern and the role.
    """
    for pattern, role in roles.items():
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise InitializationError(f"roles: {pattern!r} is no regular expression: {error}") from error
        for one in [role] if isinstance(role, str) else role:
            text = one if isinstance(one, str) else one[0]
            if text not in _CONSTANTS and text.removesuffix(TRANSPOSED) not in MATRIX_ROLES:
                known = ", ".join((*MATRIX_ROLES, *_CONSTANTS))
                raise InitializationError(
                    f"roles[{pattern!r}]={text!r} is not a role: use one of {known}, with {TRANSPOSED!r} behind it for a "
                    "matrix of (in, out)"
                )
            if text in _CONSTANTS and not isinstance(role, str):
                raise InitializationError(
                    f"roles[{pattern!r}]: {text!r} cannot be a part of a tensor: name matrices only"
                )


def _entry(name: str, shape: tuple[int, ...], role: Role) -> Entry:
    if isinstance(role, str) and role in _CONSTANTS:
        return _CONSTANTS[role]
    transposed = (role if isinstance(role, str) else str(role[-1])).endswith(TRANSPOSED)
    if len(shape) != 2:
        raise InitializationError(
            f"roles: {name} has shape {shape}, and a matrix has two axes: give it 'norm', 'bias' or 'keep'"
        )
    if isinstance(role, str):
        return whole(name, role.removesuffix(TRANSPOSED), shape, transposed)
    total = shape[1] if transposed else shape[0]
    parts = [
        (one.removesuffix(TRANSPOSED), total // len(role)) if isinstance(one, str) else (one[0], one[1]) for one in role
    ]
    stem = name.removesuffix(".weight")
    try:
        return fused([(f"{stem}.{part}.weight", part, rows) for part, rows in parts], shape, transposed=transposed)
    except ValueError as error:
        raise InitializationError(f"roles: {name} of shape {shape}: {error}") from error


def entries_by_pattern(roles: Mapping[str, Role], shapes: Shapes) -> dict[str, Entry]:
    """The entry of every parameter that a pattern matches; the first pattern that does holds.

    Logical names are the parameters' own, with the role after a fused one.

    Raises:
        InitializationError: a pattern matches nothing, or a shape does not fit its role.
    """
    found: dict[str, Entry] = {}
    unused = set(roles)
    for name, shape in shapes.items():
        for pattern, role in roles.items():
            if _matches(pattern, name):
                unused.discard(pattern)
                found.setdefault(name, _entry(name, shape, role))
    if unused:
        some = ", ".join(list(shapes)[:3])
        raise InitializationError(
            f"roles: {', '.join(map(repr, sorted(unused)))} match no parameter: the model's are named as {some}"
        )
    return found
