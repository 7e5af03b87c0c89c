"""A stored config, as a checkpoint holds it, held against the schema: somebody may have edited it, or another version written
it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, get_type_hints

from megagamma.config.schema import Config
from megagamma.errors import ConfigurationError


def config_of_sections(values: dict[str, Any]) -> Config:
    """The config of plain values; what is left out takes its default. Bounds and rules are `validate`'s matter.

    Raises:
        ConfigurationError: an option that does not exist, or a value that is not of its type.
    """
    hints = get_type_hints(Config)
    sections: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigurationError(_unknown(str(name)))
        kind = hints[name]
        sections[name] = _section(name, kind, value) if dataclasses.is_dataclass(kind) else _typed(name, kind, value)
    return Config(**sections)


def _unknown(name: str) -> str:
    return (
        f"{name[:200]} is not an option of this version: the config was written by a newer version, or altered: use the "
        "version that wrote it"
    )


def _section(name: str, kind: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{name}={str(value)[:200]}: must be a section of options")
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise ConfigurationError(_unknown(f"{name}.{key}"))
    return kind(**{key: _typed(f"{name}.{key}", hints[key], item) for key, item in value.items()})


def _typed(name: str, kind: Any, value: Any) -> Any:
    """The value, with JSON's lists as tuples where those are meant.

    Raises:
        ConfigurationError: it is not of the type.
    """
    if not _fits(kind, value):
        raise ConfigurationError(f"{name}={str(value)[:200]}: must be {_words(kind)}")
    return tuple(value) if typing.get_origin(kind) is tuple else value


def _fits(kind: Any, value: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        return any(_fits(part, value) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is list:
        return isinstance(value, list) and all(_fits(parts[0], item) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(parts) and all(map(_fits, parts, value))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(parts[0], k) and _fits(parts[1], v) for k, v in value.items())
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in names:
        return names[kind]
    return {list: "a list", tuple: f"a list of {len(parts)}", dict: "a mapping"}[origin] + f" of {_words(parts[-1])}"
