"""The only reader of YAML: safe, bounded, and without the surprises of YAML 1.1.

A text is looked through as a stream of events, which costs no memory, before anything is built from it: size, depth,
aliases (which can expand a hundred bytes to gigabytes), repeated keys (of which YAML readers take the last, silently), tags
and long numbers. Numbers are read as they look: 1e-3 is a number, 010 is ten and not eight, 1:30 is text and not ninety.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megagamma.reading import MAX_NUMBER_LENGTH, MIB, Unreadable, read_text

MAX_YAML_BYTES = MIB
MAX_VALUES = 20_000
# The command-line parser takes a time that grows with the square of a list.
MAX_ITEMS = 1_000
_MAX_DEPTH = 50
_TAG = "tag:yaml.org,2002:"
_TAGS = (None, "!", f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map")
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader with other rules for what is a number, and no dates."""


def _integer(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    digits = text.lstrip("+-")
    value = int(digits, {"0b": 2, "0x": 16}.get(digits[:2], 10))
    return -value if text.startswith("-") else value


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.removeprefix(_TAG) not in ("timestamp", "float", "int")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(rf"(?:{_FLOAT.pattern})\Z"), list("-+0123456789."))
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(rf"(?:{_INTEGER.pattern})\Z"), list("-+0123456789"))
_Loader.add_constructor(f"{_TAG}int", _integer)


class _Scan:
    """Looks through the events of one document, and raises at the first that is not allowed."""

    def __init__(self, max_values: int, max_items: int) -> None:
        self.max_values, self.max_items = max_values, max_items
        self.values = 0  # with every alias expanded
        self.anchors: dict[str, int | None] = {}  # values below an anchor; None while it is being read
        # Of each open list or mapping: its anchor, values before it, keys with their lines (None: a list), whether a key
        # comes next, and its values so far.
        self.open: list[list[Any]] = []

    def scan(self, text: str) -> None:
        documents = 0
        for event in yaml.parse(text, Loader=_Loader):
            line = event.start_mark.line + 1 if event.start_mark else 0
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise Unreadable(f"a second document begins in line {line}: keep one, without '---' between")
            elif isinstance(event, yaml.AliasEvent):
                self._alias(str(event.anchor), line)
            elif isinstance(event, yaml.ScalarEvent):
                self._check_tag(event.tag, line)
                self._scalar(event, line)
            elif isinstance(event, yaml.CollectionStartEvent):
                self._check_tag(event.tag, line)
                self._begin(event, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before, *_ = self.open.pop()
                if anchor:
                    self.anchors[anchor] = self.values - before
                self._value_done()

    def _check_tag(self, tag: str | None, line: int) -> None:
        if tag not in _TAGS:
            raise Unreadable(f"the tag {str(tag)[:80]} in line {line}: tags are not read: write the value plainly")

    def _count(self, number: int, line: int) -> None:
        self.values += number
        if self.open:
            self.open[-1][4] += 1
            if self.open[-1][4] > self.max_items * (1 if self.open[-1][2] is None else 2):
                raise Unreadable(f"a list or mapping of more than {self.max_items:,} values, by line {line}")
        if self.values > self.max_values:
            raise Unreadable(f"more than {self.max_values:,} values, aliases expanded, by line {line}")

    def _value_done(self) -> None:
        if self.open and self.open[-1][2] is not None:
            self.open[-1][3] = not self.open[-1][3]

    def _is_key(self) -> bool:
        return bool(self.open) and self.open[-1][2] is not None and self.open[-1][3]

    def _alias(self, anchor: str, line: int) -> None:
        if self.anchors.get(anchor, 0) is None:
            raise Unreadable(f"*{anchor} in line {line} holds itself")
        self._count(self.anchors.get(anchor) or 1, line)
        self._value_done()

    def _scalar(self, event: Any, line: int) -> None:
        text = event.value
        if self._is_key():
            keys = self.open[-1][2]
            # Two merges are both done, one after the other.
            if text in keys and text != "<<":
                raise Unreadable(f"{text[:80]!r} is given twice (lines {keys[text]} and {line}): keep one of them")
            keys[text] = line
        if not event.style and len(text) > MAX_NUMBER_LENGTH and re.fullmatch(r"[-+]?[0-9][0-9_.]*", text):
            raise Unreadable(
                f"a number of {len(text):,} digits in line {line} ({text[:20]}...): at most {MAX_NUMBER_LENGTH} are read"
            )
        self._count(1, line)
        if event.anchor:
            self.anchors[event.anchor] = 1
        self._value_done()

    def _begin(self, event: Any, line: int) -> None:
        if self._is_key():
            raise Unreadable(f"a list or mapping as a key in line {line}: keys are words")
        if len(self.open) >= _MAX_DEPTH:
            raise Unreadable(f"nested deeper than {_MAX_DEPTH} levels in line {line}")
        self._count(1, line)
        if event.anchor:
            self.anchors[event.anchor] = None
        keys: dict[str, int] | None = {} if isinstance(event, yaml.MappingStartEvent) else None
        self.open.append([event.anchor, self.values - 1, keys, True, 0])


def parse_yaml(
    text: str, max_bytes: int = MAX_YAML_BYTES, max_values: int = MAX_VALUES, max_items: int = MAX_ITEMS
) -> Any:
    """The value of a YAML text of one document; None when it is empty.

    Args:
        max_bytes: largest text. Unit: bytes.
        max_values: most scalars, lists and mappings, with every alias expanded.
        max_items: most of them in one list or mapping.

    Raises:
        Unreadable: not YAML, or something that is not allowed; the message names the line.
    """
    if len(text) > max_bytes:
        raise Unreadable(f"{len(text):,} characters, where at most {max_bytes:,} are read")
    try:
        _Scan(max_values, max_items).scan(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise Unreadable(f"not YAML ({' '.join(str(error).split())[:400]})") from None
    except UnicodeEncodeError:
        raise Unreadable("not YAML (half of a surrogate pair: save it as UTF-8)") from None


def read_card_header(text: str) -> Any:
    """The value of the YAML header of a data set's README; some list hundreds of configs.

    Raises:
        Unreadable: see `parse_yaml`.
    """
    return parse_yaml(text, max_bytes=16 * MIB, max_values=1_000_000, max_items=100_000)


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file.

    Raises:
        OSError: it is missing or cannot be read.
        Unreadable: see `megagamma.reading.read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, MAX_YAML_BYTES))


def parse_value(text: str) -> Any:
    """A value of the command line, for the parser; a word in braces or before a colon, which YAML takes for a mapping to
    nothing, stays text.

    Raises:
        Unreadable: see `parse_yaml`.
    """
    value = parse_yaml(text)
    if isinstance(value, dict) and value and all(item is None for item in value.values()):
        words = text.strip(" {}").replace(" ", "").split(",")
        if set(words) == set(value) or text.strip() == f"{next(iter(value))}:":
            return text
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes every word, so that none is read as a number."""


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(f"{_TAG}str", text, style='"'))


class _PlainDumper(yaml.SafeDumper):
    """Quotes a word only where it would be read as something else."""


def _plain_word(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    number = _FLOAT.fullmatch(text) or _INTEGER.fullmatch(text)
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if number else None)


_PlainDumper.add_representer(str, _plain_word)


def write_yaml(values: Any) -> str:
    """YAML for people, which `parse_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False)  # type: ignore[no-any-return]


def write_quoted(values: Any) -> str:
    """YAML that `parse_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)  # type: ignore[no-any-return]
