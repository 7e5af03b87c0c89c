"""Names of benchmarks -> lm-eval tasks: presets, few-shot counts, nearest names, what data each needs.

Nothing here loads a model or a data set, so that a wrong name or a missing data set is reported at once.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagamma.errors import EvaluationError
from megagamma.evaluation import compat, mirror
from megagamma.evaluation.scores import reason
from megagamma.evaluation.trust import require_trust

# Where a few-shot count comes from. The counts of the paper (arXiv 2606.17945) are not known to us.
YAML = "the task's own YAML in lm-eval"
DEFAULT = "lm-eval's default: the task's YAML names none"
REQUESTED = "asked for"

# Task, few-shot count, where the count comes from. The list of benchmarks, and its order in two groups, is inferred from
# the paper's references [INF]. The MATH of the paper may be either of lm-eval's two; minerva_math brings worked examples,
# without which a base model does not know the form of an answer [INF].
PRESETS: dict[str, tuple[tuple[str, int, str], ...]] = {
    "reasoning": (
        ("arc_challenge", 0, DEFAULT),
        ("bbh", 3, YAML),
        ("social_iqa", 0, DEFAULT),
        ("gsm8k", 5, YAML),
        ("minerva_math", 4, YAML),
    ),
    "knowledge": (
        ("arc_easy", 0, DEFAULT),
        ("triviaqa", 0, DEFAULT),
        ("mmlu", 0, DEFAULT),
        ("hellaswag", 0, DEFAULT),
    ),
    # Multiple choice only: no text is generated.
    "quick": (("arc_easy", 0, DEFAULT), ("arc_challenge", 0, DEFAULT), ("social_iqa", 0, DEFAULT)),
}


@dataclass
class TaskRequest:
    """What is to be scored.

    Attributes:
        names: presets, tasks, groups and tags of lm-eval; `name:5` asks for five examples in the prompt.
        include_path: folder of task YAMLs of your own, which win over lm-eval's tasks of the same name.
    """

    names: list[str]
    include_path: Path | None = None
    fewshot: dict[str, tuple[int, str]] = field(init=False, default_factory=dict)
    """Few-shot count and its source by name of task, group or tag."""
    expanded: list[str] = field(init=False, default_factory=list)
    """Names with the presets replaced by what they stand for, each once."""

    def __post_init__(self) -> None:
        names = [name.strip() for item in self.names for name in item.split(",") if name.strip()]
        if not names:
            raise EvaluationError(f"tasks={self.names} names nothing: give {', '.join(PRESETS)}, or tasks of lm-eval")
        for name in names:
            preset = PRESETS.get(name)
            for task, count, source in preset or ():
                self.fewshot.setdefault(task, (count, source))
            base, _, count_text = name.rpartition(":")
            if base and count_text.isdigit():
                self.fewshot[base] = (int(count_text), REQUESTED)
                name = base
            self.expanded += [task for task, *_ in preset] if preset else [name]
        self.expanded = list(dict.fromkeys(self.expanded))
        if self.include_path is not None:
            self.include_path = Path(self.include_path).expanduser().resolve()
            _check_folder(self.include_path)


def _check_folder(folder: Path) -> None:
    """Check what lm-eval would leave out without a word.

    Raises:
        EvaluationError: no folder, no YAML in it, or one that cannot be read.
    """
    files = sorted(folder.rglob("*.yaml")) if folder.is_dir() else []
    if not files:
        raise EvaluationError(f"include_path={folder}: holds no .yaml file: give a folder of lm-eval task configs")
    for file in files:
        try:
            compat.read_task_yaml(file)
        except Exception as error:
            raise EvaluationError(f"include_path: {file}: {' '.join(str(error).split())}: fix the file") from error


@dataclass
class PlannedTask:
    """A single task that can be built.

    Attributes:
        name: lm-eval's.
        fewshot: examples in the prompt, and where the number comes from.
        dataset: the data set that it reads, and its config; None where only the task's Python code knows.
        version: the task's, from its YAML.
    """

    name: str
    fewshot: int
    fewshot_source: str
    dataset: str | None
    dataset_config: str | None
    version: str
    _entry: Any
    _overrides: dict[str, Any]

    def build(self, seed: int) -> Any:
        """The lm-eval task, its data read.

        Args:
            seed: of the choice of examples.
        """
        task = compat.build_task(self._entry, self._overrides)
        task.set_config(key="num_fewshot", value=self.fewshot)
        task.set_fewshot_seed(seed=seed)
        return task


@dataclass
class Plan:
    """Tasks in the order of the request, each once, and the groups whose members they are."""

    request: TaskRequest
    tasks: list[PlannedTask]
    groups: list[Any]
    """lm-eval groups, members before the groups that hold them."""
    members: dict[str, list[str]]
    """Tasks of every requested name: itself, or what a group or tag stands for."""

    @property
    def datasets(self) -> list[tuple[str, str | None, str | None]]:
        """Task, data set and the set's config."""
        return [(task.name, task.dataset, task.dataset_config) for task in self.tasks]


@functools.cache
def _stock_names() -> dict[str, str]:
    """Every task and group of lm-eval and the top folder that defines it. Tags are not among them.

    A search for the lines that name them takes a fraction of a second; why not lm-eval's index: see `compat`.
    """
    root = compat.stock_folder()
    pattern = re.compile(rb"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
    families: dict[str, str] = {}
    for path in sorted(root.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        for name in pattern.findall(path.read_bytes()):
            families.setdefault(name.decode(errors="replace"), path.relative_to(root).parts[0])
    return families


def _mentions(names: Iterable[str]) -> dict[str, set[str]]:
    """The top folders of lm-eval in whose YAML files each of these words stands, as a tag would, or is included from."""
    words = {name: re.compile(rb"(?<![\w/-])" + re.escape(name.encode()) + rb"(?![\w/-])") for name in names}
    mentions: dict[str, set[str]] = {name: set() for name in words}
    borrowed: set[tuple[str, str]] = set()
    include = re.compile(rb"^include:[ \t]*[\"']?(\S*\.\./[^\s\"']+)", re.MULTILINE)
    root = compat.stock_folder()
    for path in root.rglob("*") if words else ():
        # Templates that others include have no suffix.
        if path.suffix not in ("", ".yaml") or not path.is_file():
            continue
        text, family = path.read_bytes(), path.relative_to(root).parts[0]
        for name, word in words.items():
            if name.encode() in text and word.search(text):
                mentions[name].add(family)
        for other in include.findall(text):
            target = Path(os.path.normpath(path.parent / other.decode(errors="replace")))
            if target.is_relative_to(root):
                borrowed.add((family, target.relative_to(root).parts[0]))
    return {name: places | {by for by, of in borrowed if of in places} for name, places in mentions.items()}


def _reach(manager: Any, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Names that an index does not know, and tags, of some names and of all that their groups refer to."""
    lacking, tags, todo, seen = set(), set(), list(names), set()
    while todo:
        name = todo.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        entry = compat.index_entry(manager, name)
        if entry is None:
            lacking.add(name)
        elif entry.kind == "tag":
            tags.add(name)
        elif entry.kind == "group":
            todo += _children(entry.settings.get("task") or [])
    return lacking, tags


def _children(items: Iterable[Any]) -> list[str]:
    """Names in a group's list of tasks; what the list itself defines is none."""
    names: list[str] = []
    for item in items:
        if isinstance(item, str):
            names.append(item)
        elif isinstance(item.get("task"), list):
            names += _children(item["task"])
        elif "dataset_path" not in item:
            names.append(item.get("task") or item.get("group") or "")
    return names


def _manager(request: TaskRequest) -> Any:
    """A TaskManager that knows the requested names, over as few of lm-eval's folders as possible.

    Raises:
        EvaluationError: unknown names, with the nearest ones.
    """
    own = [str(request.include_path)] if request.include_path else []
    families: set[str] = set()
    while True:
        # Later folders win, while within lm-eval's tree the first does.
        paths = [str(compat.stock_folder() / family) for family in sorted(families, reverse=True)]
        manager = compat.task_manager([*paths, *own], include_defaults=False)
        lacking, tags = _reach(manager, request.expanded)
        needed = {_stock_names()[name] for name in lacking if name in _stock_names()}
        mentions = _mentions({name for name in lacking if name not in _stock_names()} | tags) if lacking or tags else {}
        needed = needed.union(*mentions.values()) - families
        if any(len(places) > 1 for places in mentions.values()) or (not needed and any(mentions.values()) and lacking):
            # A tag of several folders, or one that is put together in Python: only the whole index has it whole.
            manager = compat.task_manager(own, include_defaults=True)
            lacking, _ = _reach(manager, request.expanded)
            break
        if not needed:
            break
        families |= needed
    unknown = [name for name in request.expanded if name in lacking]
    if unknown:
        names = {*PRESETS, *_stock_names(), *manager.all_tasks}
        raise EvaluationError("; ".join(_unknown(name, names) for name in unknown))
    return manager


def _unknown(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
    return f"tasks: {name!r} is no preset, task, group or tag: {hint}"


def plan(request: TaskRequest) -> Plan:
    """Resolve names to tasks; no data set is read.

    Raises:
        EvaluationError: unknown names, with the nearest ones.
    """
    from lm_eval.api.group import Group

    manager = _manager(request)
    tasks: dict[str, PlannedTask] = {}
    groups: dict[str, Any] = {}
    members: dict[str, list[str]] = {}

    def add(item: Any, counts: dict[str, tuple[int, str]], pinned: tuple[int, str] | None) -> list[str]:
        """Add a task, or a group's tasks and then the group; returns the tasks' names."""
        if isinstance(item, Group):
            pinned = counts.get(item.name, pinned)
            names = [name for child in item for name in add(child, counts, pinned)]
            groups.setdefault(item.name, item)
            return names
        if not compat.is_unread(item):
            raise EvaluationError(f"tasks: {item.task_name} is defined inside a group: give it a YAML file of its own")
        task = _planned(item, counts.get(item.task_name, pinned))
        if tasks.setdefault(task.name, task).fewshot != task.fewshot:
            raise EvaluationError(
                f"tasks: {task.name} is asked for with {tasks[task.name].fewshot} and with {task.fewshot} examples: score "
                "them one after the other"
            )
        return [task.name]

    for name in request.expanded:
        try:
            loaded = compat.load_unread(manager, name)
        except Exception as error:
            raise EvaluationError(f"tasks: {name}: its config cannot be used ({reason(error)}): fix it") from error
        top = [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())
        pinned = request.fewshot.get(name)
        members[name] = [task for item in top for task in add(item, request.fewshot, pinned)]
    return Plan(request, list(tasks.values()), list(groups.values()), members)


def _planned(task: Any, requested: tuple[int, str] | None) -> PlannedTask:
    """A task with its few-shot count settled, by lm-eval's rule: a 0 written in the YAML is never overruled.

    Args:
        task: from `compat.load_unread`.
        requested: few-shot count and its source.
    """
    settings = task.settings
    own = settings.get("num_fewshot")
    if own == 0 and requested and requested[0]:
        requested = (0, f"{YAML}, which sets 0 and is not overruled")
    count, source = requested or ((0, DEFAULT) if own is None else (int(own), YAML))
    dataset = settings.get("dataset_path")
    if settings.get("custom_dataset") or not isinstance(dataset, str):
        dataset = None
    metadata = settings.get("metadata")
    version = metadata.get("version", "unknown") if isinstance(metadata, dict) else "unknown"
    overrides = dict(task.overrides)
    if dataset and not mirror.is_hub_name(dataset) and task.folder is not None:
        overrides |= _absolute_files(settings, task.folder)
    config = settings.get("dataset_name")
    return PlannedTask(settings["task"], count, source, dataset, config, str(version), task.entry, overrides)


def _absolute_files(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths of a task's own files, which lm-eval takes from the working directory: from its YAML's folder if they are there."""

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(item) for key, item in value.items()}
        if isinstance(value, list):
            return [absolute(item) for item in value]
        beside = folder / str(value)
        return str(beside) if beside.exists() and not os.path.exists(str(value)) else value

    options = dict(settings.get("dataset_kwargs") or {})
    changed = {key: absolute(options[key]) for key in ("data_files", "data_dir") if key in options}
    return {"dataset_kwargs": {**options, **changed}} if changed else {}


def describe(plan: Plan) -> list[str]:
    """One line per task: its few-shot count and where the count comes from."""
    return [f"{task.name}: {task.fewshot}-shot ({task.fewshot_source})" for task in plan.tasks]


def check(
    names: list[str],
    include_path: str | Path | None,
    root: str | Path | None,
    trusted: bool = False,
    trust_option: str = "--trust_tasks",
) -> Plan:
    """Everything about a request that can be checked before a model is there: names, and the mirror's data sets.

    Args:
        trusted: whether the tasks in `include_path` may run code of their author; `trust_option` says so.

    Raises:
        EvaluationError: unknown names, tasks that are not trusted, or data sets that the mirror lacks.
    """
    if include_path:
        require_trust(include_path, trusted, trust_option)
    request = TaskRequest(names, Path(include_path) if include_path else None)
    ready = plan(request)
    mirror.require(mirror.find_mirror(root), ready.datasets, request.expanded)
    return ready


def dataset_configs(plan: Plan) -> dict[str, list[str | None]]:
    """The hub's data sets that a plan's tasks read, and their configs."""
    datasets: dict[str, dict[str | None, None]] = {}
    for _, name, config in plan.datasets:
        if name and mirror.is_hub_name(name):
            datasets.setdefault(name, {})[config] = None
    return {name: list(configs) for name, configs in datasets.items()}
