"""The spellings of `init.exponents`: a mapping, or a key of its own for each role, as older versions wrote it."""

from __future__ import annotations

import contextlib
from typing import Any

from megagamma.config.schema import ROLES
from megagamma.config.yaml_reader import parse_yaml
from megagamma.errors import ConfigurationError
from megagamma.reading import Unreadable


def take_exponents(init: dict[str, Any], source: str) -> dict[str, float | None]:
    """Take the exponents of roles out of a section `init`: `exponents: {query: 0.5}`, or `query: 0.5` for short.

    Config files and checkpoints of older versions have the short form for every role, with null for init.gamma.

    Args:
        init: changed in place: without `exponents` and the roles.
        source: where it comes from, for messages.

    Returns:
        Exponent by role; None takes the role's exponent back.

    Raises:
        ConfigurationError: not a mapping, not a number, or two values for one role.
    """
    exponents = init.pop("exponents", None)
    if exponents is None:
        exponents = {}
    if not isinstance(exponents, dict):
        raise ConfigurationError(f"{source}init.exponents={exponents!r} must map roles to numbers: {{query: 0.5}}")
    result = {role: _exponent(value, f"{source}init.exponents.{role}") for role, value in exponents.items()}
    for role in ROLES:
        if role not in init:
            continue
        value = _exponent(init.pop(role), f"{source}init.{role}")
        if role in result and value is not None and result[role] != value:
            raise ConfigurationError(
                f"{source}init.{role}={value} and init.exponents.{role}={result[role]} differ: give one of them"
            )
        result.setdefault(role, value)
    return result


def _exponent(value: Any, name: str) -> float | None:
    if isinstance(value, str):
        # YAML reads 1e-1 as text.
        with contextlib.suppress(ValueError):
            value = float(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigurationError(f"{name}={value} must be a number, or null for init.gamma")
    return None if value is None else float(value)


def merge_exponents(older: dict[str, float], newer: dict[str, float | None]) -> dict[str, float]:
    """The newer value of each role, or else the older; roles whose value is None are left out."""
    merged = {**older, **newer}
    return {role: value for role, value in merged.items() if value is not None}


def flag_value(text: str) -> Any:
    """A flag's value as YAML, as the parser reads it."""
    try:
        return parse_yaml(text)
    except Unreadable:
        return text
