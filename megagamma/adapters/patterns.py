"""Roles that the user gives, by patterns for names; and tables by name of libraries that have no classes of their own."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
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


def _parts(pattern: str, role: Role) -> list[tuple[str, int | None]]:
    """(role, rows or None) of every part that a role names.

    Raises:
        InitializationError: it is none of the forms of `Role`.
    """
    if isinstance(role, str):
        return [(role, None)]
    parts: list[tuple[str, int | None]] = []
    for one in role if isinstance(role, Sequence) else ():
        if isinstance(one, str):
            parts.append((one, None))
        elif (
            isinstance(one, Sequence)
            and len(one) == 2
            and isinstance(one[0], str)
            and type(one[1]) is int
            and one[1] > 0
        ):
            parts.append((one[0], one[1]))
        else:
            parts = []
            break
    if not parts or len({rows is None for _, rows in parts}) > 1:
        raise InitializationError(
            f"roles[{pattern!r}]={role!r}: must be a role, several roles of equal parts, or (role, rows) of each part"
        )
    return parts


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
        names = [name for name, _ in _parts(pattern, role)]
        for name in names:
            if name not in _CONSTANTS and name.removesuffix(TRANSPOSED) not in MATRIX_ROLES:
                known = ", ".join((*MATRIX_ROLES, *_CONSTANTS))
                raise InitializationError(
                    f"roles[{pattern!r}]={name!r} is not a role: use one of {known}, with {TRANSPOSED!r} behind it for a "
                    "matrix of (in, out)"
                )
            if name in _CONSTANTS and not isinstance(role, str):
                raise InitializationError(
                    f"roles[{pattern!r}]: {name!r} cannot be a part of a tensor: name matrices only"
                )
        if len({name.endswith(TRANSPOSED) for name in names}) > 1:
            raise InitializationError(
                f"roles[{pattern!r}]: a tensor is (in, out) or not: all its parts end in {TRANSPOSED!r}"
            )


def _entry(name: str, shape: tuple[int, ...], pattern: str, role: Role) -> Entry:
    if isinstance(role, str) and role in _CONSTANTS:
        return _CONSTANTS[role]
    if len(shape) != 2:
        raise InitializationError(
            f"roles: {name} has shape {shape}, and a matrix has two axes: give it 'norm', 'bias' or 'keep'"
        )
    parts = _parts(pattern, role)
    transposed = parts[0][0].endswith(TRANSPOSED)
    if isinstance(role, str):
        return whole(name, role.removesuffix(TRANSPOSED), shape, transposed)
    total, stem = shape[1] if transposed else shape[0], name.removesuffix(".weight")
    named, seen = [], Counter[str]()
    for part, rows in parts:
        part = part.removesuffix(TRANSPOSED)
        seen[part] += 1
        # A role that comes again is a matrix of its own, with a stream of its own.
        number = f".{seen[part]}" if seen[part] > 1 else ""
        named.append((f"{stem}.{part}{number}.weight", part, total // len(parts) if rows is None else rows))
    try:
        return fused(named, shape, transposed=transposed)
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
                if name not in found:
                    found[name] = _entry(name, shape, pattern, role)
    if unused:
        some = ", ".join(list(shapes)[:3])
        raise InitializationError(
            f"roles: {', '.join(map(repr, sorted(unused)))} match no parameter: the model's are named as {some}"
        )
    return found
