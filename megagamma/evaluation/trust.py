"""What a folder of lm-eval tasks would run: Python functions, templates outside a sandbox, code of data sets and metrics.

lm-eval's own tasks run, and those that `megagamma.evaluation.continuation` writes. For any other folder whoever starts
the command has to say that its author is trusted. Nothing here imports or renders what it looks at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megagamma.errors import EvaluationError
from megagamma.evaluation import compat
from megagamma.evaluation.continuation import is_own_task

_SHOWN = 8
_MOST_DEPTH = 100
# Readers of `datasets` that unpickle files.
_PICKLES = ("pandas", "webdataset")


def require_trust(folder: str | Path, trusted: bool, option: str) -> None:
    """Refuse a folder of tasks that would run something, unless it is trusted.

    Args:
        option: how to say so, named in the error.

    Raises:
        EvaluationError: with what would run, by file; or a file cannot be read.
    """
    found = [] if trusted else what_runs(Path(folder).expanduser())
    if found:
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise EvaluationError(
            f"include_path={folder}: these tasks would run code of their author: {'; '.join(found[:_SHOWN])}{more}: read "
            f"them, and say {option} if you trust them"
        )


def what_runs(folder: Path) -> list[str]:
    """What the task YAMLs of a folder, and the files that they include, would run; empty when they are data alone."""
    found: list[str] = []
    todo, seen = sorted(folder.rglob("*.yaml")) if folder.is_dir() else [], set()
    stock = compat.stock_folder().resolve()
    while todo:
        file = todo.pop(0).resolve()
        if file in seen or file.is_relative_to(stock):
            continue
        seen.add(file)
        try:
            content = file.read_bytes()
            if is_own_task(content):
                continue
            root = yaml.compose(content, Loader=yaml.SafeLoader)
            nodes = list(_nodes(root))
        except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
            raise EvaluationError(f"include_path: {file}: {' '.join(str(error).split())}: fix the file") from error
        name = file.relative_to(folder.resolve()) if file.is_relative_to(folder.resolve()) else file
        for key, node in nodes:
            found += [f"{name}: {text}" for text in _runs(key, node, file.parent)]
            if key == "include" and isinstance(node.value, str):
                todo.append(file.parent / node.value)
    return found


def _nodes(root: Any) -> Iterator[tuple[str, Any]]:
    """(key that it stands under, scalar) of a YAML document; what aliases repeat is seen once."""
    todo, seen = [("", root, 0)], set()
    while todo:
        key, node, depth = todo.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if depth > _MOST_DEPTH:
            raise ValueError(f"nested deeper than {_MOST_DEPTH}")
        if isinstance(node, yaml.MappingNode):
            for name, value in reversed(node.value):
                text = name.value if isinstance(name, yaml.ScalarNode) else key
                todo += [(text, value, depth + 1), (key, name, depth + 1)]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(key, value, depth + 1) for value in reversed(node.value)]
        else:
            yield key, node


def _runs(key: str, node: Any, folder: Path) -> Iterator[str]:
    """What a scalar makes lm-eval run."""
    text = str(node.value)
    if node.tag == "!function":
        beside = folder / f"{text.rpartition('.')[0].replace('.', '/')}.py"
        yield f"{key} calls {text} of {beside if beside.exists() else 'an installed module'}"
    elif node.tag.startswith("!") or node.tag.startswith("tag:yaml.org,2002:python"):
        yield f"{key} has the tag {node.tag}"
    if "{{" in text or "{%" in text:
        yield f"{key} is a Jinja template, which can call Python"
    if key in ("trust_remote_code", "hf_evaluate") and text.lower() not in ("false", "no", "off", "0"):
        yield f"{key}: {text} runs a script of a data set or a metric"
    if key == "metric" and ("/" in text or text.endswith(".py")):
        yield f"metric {text} is a script"
    if key == "dataset_path":
        place = folder / text
        if text.endswith(".py") or (place.is_dir() and any(place.glob("*.py"))):
            yield f"dataset_path {text} has a loading script"
        if text in _PICKLES:
            yield f"dataset_path {text} reads pickles"
