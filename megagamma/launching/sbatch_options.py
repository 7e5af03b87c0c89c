"""Options of sbatch, however they are written: `--name=value`, `--name value`, `-N4`, `-p gpu`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megagamma.errors import ConfigurationError

_LETTERS = {
    "A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint", "c": "cpus-per-task",
    "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "i": "input", "J": "job-name",
    "k": "no-kill", "L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks", "O": "overcommit",
    "o": "output", "p": "partition", "Q": "quiet", "q": "qos", "S": "core-spec", "s": "oversubscribe", "t": "time",
    "v": "verbose", "W": "wait", "w": "nodelist", "x": "exclude",
}  # fmt: skip
_WITHOUT_VALUE = "HkOQsvW"
GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres")
"""Options that may ask for GPUs, see `names_gpus`."""


class Option(NamedTuple):
    """One option."""

    name: str
    """The long name, without dashes."""
    value: str | None

    def __str__(self) -> str:
        """As one word of a command line."""
        return f"--{self.name}" + ("" if self.value is None else f"={self.value}")


def parse(words: Iterable[str], place: str = "options of sbatch") -> list[Option]:
    """Options by their long names, in order.

    Args:
        words: of a command line, without a script.
        place: what holds the words, for messages.

    Raises:
        ConfigurationError: a word that is neither an option nor the value of one.
    """
    rest, options = list(words), []

    def next_value() -> str | None:
        return rest.pop(0) if rest and not rest[0].startswith("-") else None

    while rest:
        word = rest.pop(0)
        value: str | None
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            options.append(Option(name, value if equals else next_value()))
        elif re.match(r"-[A-Za-z]", word):
            name = _LETTERS.get(word[1], word[1])
            if word[1] not in _WITHOUT_VALUE:
                options.append(Option(name, word[2:] or next_value()))
                continue
            options.append(Option(name, None))
            if word[2:]:
                rest.insert(0, f"-{word[2:]}")
        else:
            raise ConfigurationError(f"{place}: {word} is no option of sbatch: give --name=value")
    return options


def parse_text(text: str, place: str) -> list[Option]:
    """Options of a text that is quoted as in a shell.

    Raises:
        ConfigurationError: a quote that is not closed, or a word that is no option.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"{place}={text}: {error}: close the quote") from error
    return parse(words, place)


def value_of(options: Iterable[Option], *names: str) -> str | None:
    """Value of the last option with one of these names; None where there is none."""
    values = [option.value for option in options if option.name in names]
    return values[-1] if values else None


def names_gpus(option: Option) -> bool:
    """Whether an option asks for GPUs; --gres may ask for something else."""
    if option.name == "gres":
        return any(entry.split(":")[0] == "gpu" for entry in (option.value or "").split(","))
    return option.name in GPU_OPTIONS


def gpus_per_node(options: Sequence[Option]) -> int | None:
    """GPUs of a node that --gpus-per-node or --gres ask for; None where they ask for none, or in a way not known here."""
    for option in reversed(options):
        if option.name not in ("gpus-per-node", "gres") or not names_gpus(option):
            continue
        count = 0
        for entry in re.sub(r"\([^)]*\)", "", option.value or "").split(","):
            words = entry.split(":")
            if option.name == "gres" and words[0] != "gpu":
                continue
            last = words[-1]
            if not last.isdigit() and option.name == "gpus-per-node":
                return None
            count += int(last) if last.isdigit() else 1
        return count
    return None
