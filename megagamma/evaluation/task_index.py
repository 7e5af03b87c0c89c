"""lm-eval's index of tasks, groups and tags, over as few of its folders as a request needs.

The whole index takes ten seconds and more (see `compat`); a look at the lines that define names takes less than one.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megagamma.errors import EvaluationError
from megagamma.evaluation import compat


@functools.cache
def stock_folder() -> Path:
    """The folder of lm-eval's own task files."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


@functools.cache
def _stock_names() -> dict[str, str]:
    """Every task and group of lm-eval and the top folder that defines it. Tags are not among them."""
    root = stock_folder()
    pattern = re.compile(rb"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
    families: dict[str, str] = {}
    for path in sorted(root.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        for name in pattern.findall(path.read_bytes()):
            families.setdefault(name.decode(errors="replace"), path.relative_to(root).parts[0])
    return families


def _mentions(names: Iterable[str]) -> dict[str, set[str]]:
    """The top folders of lm-eval in whose YAML files each of these words stands, as a tag would, or is included from."""
    words = {name: re.compile(rb"(?<![\w/-])" + re.escape(name.encode()) + rb"(?![\w/-])") for name in names}
    families: dict[str, set[str]] = {name: set() for name in words}
    includes: set[tuple[str, str]] = set()
    include = re.compile(rb"^include:[ \t]*[\"']?(\S*\.\./[^\s\"']+)", re.MULTILINE)
    root = stock_folder()
    for path in root.rglob("*") if words else ():
        # Templates that others include have no suffix.
        if path.suffix not in ("", ".yaml") or not path.is_file():
            continue
        text, family = path.read_bytes(), path.relative_to(root).parts[0]
        for name, word in words.items():
            if name.encode() in text and word.search(text):
                families[name].add(family)
        for template in include.findall(text):
            target = Path(os.path.normpath(path.parent / template.decode(errors="replace")))
            if target.is_relative_to(root):
                includes.add((family, target.relative_to(root).parts[0]))
    return {name: places | {by for by, of in includes if of in places} for name, places in families.items()}


def _missing_names_and_tags(manager: Any, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Of some names and of all that their groups refer to: those that an index lacks, and those that are tags."""
    groups, all_tags = set(manager.all_groups), set(manager.all_tags)
    missing, tags, todo, seen = set(), set(), list(names), set()
    while todo:
        name = todo.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        if name not in manager.task_index:
            missing.add(name)
        elif name in all_tags:
            tags.add(name)
        elif name in groups:
            todo += _references(compat.group_items(manager, name))
    return missing, tags


def _references(items: Iterable[Any]) -> list[str]:
    """Names in a group's list of tasks, without what the list itself defines."""
    names: list[str] = []
    for item in items:
        if isinstance(item, str):
            names.append(item)
        elif isinstance(item.get("task"), list):
            names += _references(item["task"])
        elif "dataset_path" not in item:
            names.append(item.get("task") or item.get("group") or "")
    return names


def manager_for(names: list[str], include_path: Path | None, presets: Iterable[str] = ()) -> Any:
    """An `lm_eval.tasks.TaskManager` that knows some names.

    Args:
        names: tasks, groups and tags.
        include_path: folder of more task files, which win over lm-eval's tasks of the same name.
        presets: more names to suggest for an unknown one.

    Raises:
        EvaluationError: unknown names, with the nearest ones.
    """
    from lm_eval.tasks import TaskManager

    own = [str(include_path)] if include_path else []
    families: set[str] = set()
    while True:
        # Later folders win, while within lm-eval's tree the first does.
        paths = [str(stock_folder() / family) for family in sorted(families, reverse=True)]
        with compat.suppress_logging(compat.INDEX_LOGGER):
            manager = TaskManager(include_path=[*paths, *own], include_defaults=False)
        missing, tags = _missing_names_and_tags(manager, names)
        needed = {_stock_names()[name] for name in missing if name in _stock_names()}
        mentions = _mentions({name for name in missing if name not in _stock_names()} | tags) if missing or tags else {}
        needed = needed.union(*mentions.values()) - families
        if any(len(places) > 1 for places in mentions.values()) or (not needed and any(mentions.values()) and missing):
            # A tag of several folders, or one that is put together in Python: only the whole index has all of it.
            with compat.suppress_logging(compat.INDEX_LOGGER):
                manager = TaskManager(include_path=own or None)
            missing, _ = _missing_names_and_tags(manager, names)
            break
        if not needed:
            break
        families |= needed
    unknown = [name for name in names if name in missing]
    if unknown:
        candidates = {*presets, *_stock_names(), *manager.all_tasks}
        raise EvaluationError("; ".join(_unknown(name, candidates) for name in unknown))
    return manager


def _unknown(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
    return f"tasks: {name!r} is no preset, task, group or tag: {hint}"
