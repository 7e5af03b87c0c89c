"""Options of a run as a sweep names them: `section.key`, `init.ROLE`, and single entries of a mapping."""

from __future__ import annotations

import difflib
import functools
import typing
from typing import Any, get_type_hints

from megagamma.config.io import known_keys
from megagamma.config.schema import ROLES, Config
from megagamma.errors import ConfigurationError

# Given to each point by the sweep itself.
_RESERVED = ("run.name", "run.folder", "run.seed", "run.resume", "logging.wandb_group")


def option_names() -> list[str]:
    """Every option of a run that a sweep may set, `init.ROLE` for single exponents included."""
    return [*known_keys(), *(f"init.{role}" for role in ROLES)]


@functools.cache
def option_types() -> dict[str, Any]:
    """Type of every option of the schema, by `section.key`."""
    sections = get_type_hints(Config)
    hints = {name: get_type_hints(kind) for name, kind in sections.items() if isinstance(kind, type)}
    return {
        key: hints[key.partition(".")[0]][key.partition(".")[2]] if "." in key else sections[key]
        for key in known_keys()
    }


def is_whole(option: str) -> bool:
    """Whether an option takes whole numbers only."""
    kind = option_types().get(option)
    return kind is int or (int in typing.get_args(kind) and float not in typing.get_args(kind))


def is_mapping(option: str) -> bool:
    """Whether an option maps names to values, so that a sweep may set single entries: optimizer.lr_factors.gate."""
    return typing.get_origin(option_types().get(option)) is dict


def schema_option(name: str) -> str:
    """The option of the schema that a name sets, or whose entry it sets: init.query sets one of init.exponents."""
    section, _, key = name.partition(".")
    if section == "init" and key in ROLES:
        return "init.exponents"
    return ".".join(name.split(".")[:2])


def check_option(name: Any, where: str) -> str:
    """The name of an option.

    Raises:
        ConfigurationError: there is none of that name, or the sweep gives it itself.
    """
    if name in _RESERVED:
        raise ConfigurationError(
            f"{where}{name}: is given by the sweep itself (seeds: [...] sets the seeds): leave it out"
        )
    names, text = option_names(), str(name)
    option, entry = schema_option(text), text.split(".", 2)[2:]
    if text in names or (entry and entry[0] and is_mapping(option)):
        return text
    if entry and option in names:
        raise ConfigurationError(f"{where}{text[:100]} is not an option: {option} has no entries: set {option} itself")
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "see megagamma pretrain --help"
    raise ConfigurationError(f"{where}{text[:100]} is not an option: {hint}")


def flat_options(sections: dict[str, Any], where: str) -> dict[str, Any]:
    """Sections or dotted names of options as `section.key: value`.

    Raises:
        ConfigurationError: an option that does not exist, or that is given twice.
    """
    result: dict[str, Any] = {}
    sections_of = {key.partition(".")[0] for key in known_keys() if "." in key}
    for name, value in sections.items():
        if name in sections_of and not isinstance(value, dict):
            raise ConfigurationError(f"{where}{name}: is a section: give its options")
        items = {f"{name}.{key}": item for key, item in value.items()} if name in sections_of else {name: value}
        for key, item in items.items():
            if key in result:
                raise ConfigurationError(f"{where}{key} is given twice: keep one")
            result[check_option(key, where)] = item
    return result


def set_option(values: dict[str, Any], name: str, value: Any) -> None:
    """Set an option in a config's plain values; `init.ROLE` and keys of a mapping are single entries of it."""
    if name == "deepspeed_config":
        values[name] = value
        return
    section, _, key = name.partition(".")
    if section == "init" and key in ROLES:
        key = f"exponents.{key}"
    key, _, entry = key.partition(".")
    if entry:
        values[section][key] = {**values[section][key], entry: value}
    else:
        values[section][key] = value
    if name in ("run.tokens", "run.steps") and value is not None:
        values["run"]["steps" if name == "run.tokens" else "tokens"] = None


def is_number(value: Any) -> bool:
    """Whether a value of a YAML file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
