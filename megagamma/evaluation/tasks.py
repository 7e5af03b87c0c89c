"""Names of benchmarks -> lm-eval tasks: presets, few-shot counts, nearest names, what data each needs.

Nothing here loads a model or a data set, so that a wrong name or a missing set is reported at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megagamma.errors import EvaluationError
from megagamma.evaluation import compat, mirror, task_index
from megagamma.evaluation.scores import reason

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
        names = [name.strip() for text in self.names for name in text.split(",") if name.strip()]
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
    """Check a folder of task files. lm-eval itself leaves out a YAML file that it cannot read without a message.

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
        definition: what builds it.
    """

    name: str
    fewshot: int
    fewshot_source: str
    dataset: str | None
    dataset_config: str | None
    version: str
    definition: compat.TaskDefinition

    def build(self, seed: int) -> Any:
        """The lm-eval task, its data read.

        Args:
            seed: of the choice of examples.
        """
        task = self.definition.build()
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


def plan(request: TaskRequest) -> Plan:
    """Resolve names to tasks; no data set is read.

    Raises:
        EvaluationError: unknown names, with the nearest ones.
    """
    from lm_eval.api.group import Group

    manager = task_index.manager_for(request.expanded, request.include_path, PRESETS)
    tasks: dict[str, PlannedTask] = {}
    groups: dict[str, Any] = {}
    members: dict[str, list[str]] = {}

    def add(item: Any, fewshot: tuple[int, str] | None) -> list[str]:
        """Add a task, or a group's tasks and then the group; returns the tasks' names."""
        if isinstance(item, Group):
            fewshot = request.fewshot.get(item.name, fewshot)
            names = [name for child in item for name in add(child, fewshot)]
            groups.setdefault(item.name, item)
            return names
        definition = compat.definition_of(item)
        if definition is None:
            raise EvaluationError(f"tasks: {item.task_name} is defined inside a group: give it a YAML file of its own")
        task = _planned(definition, request.fewshot.get(definition.name, fewshot))
        first = tasks.setdefault(task.name, task)
        if first.fewshot != task.fewshot:
            raise EvaluationError(
                f"tasks: {task.name} is asked for with {first.fewshot} and with {task.fewshot} examples: score them one "
                "after the other"
            )
        return [task.name]

    for name in request.expanded:
        try:
            items = compat.load_without_data(manager, name)
        except Exception as error:
            raise EvaluationError(f"tasks: {name}: its config cannot be used ({reason(error)}): fix it") from error
        members[name] = [task for item in items for task in add(item, request.fewshot.get(name))]
    return Plan(request, list(tasks.values()), list(groups.values()), members)


def _planned(definition: compat.TaskDefinition, requested: tuple[int, str] | None) -> PlannedTask:
    """A task with its few-shot count settled, by lm-eval's rule: a 0 written in the YAML is never overruled."""
    settings = definition.settings
    own = settings.get("num_fewshot")
    if own == 0 and requested and requested[0]:
        requested = (0, f"{YAML}, which sets 0 and is not overruled")
    count, source = requested or ((0, DEFAULT) if own is None else (int(own), YAML))
    dataset = settings.get("dataset_path")
    if settings.get("custom_dataset") or not isinstance(dataset, str):
        dataset = None
    metadata = settings.get("metadata")
    version = metadata.get("version", "unknown") if isinstance(metadata, dict) else "unknown"
    if dataset and not mirror.is_hub_name(dataset) and definition.folder is not None:
        files = _absolute_files(settings, definition.folder)
        definition = replace(definition, overrides={**definition.overrides, **files})
    config = settings.get("dataset_name")
    return PlannedTask(definition.name, count, source, dataset, config, str(version), definition)


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


def check(names: list[str], include_path: str | Path | None, root: str | Path | None) -> Plan:
    """Everything about a request that can be checked before a model is there: names, and the mirror's data sets.

    Raises:
        EvaluationError: unknown names, or data sets that the mirror lacks.
    """
    request = TaskRequest(names, Path(include_path) if include_path else None)
    checked = plan(request)
    mirror.require(mirror.find_mirror(root), checked.datasets, request.expanded)
    return checked


def dataset_configs(plan: Plan) -> dict[str, list[str | None]]:
    """The hub's data sets that a plan's tasks read, and their configs."""
    sets: dict[str, dict[str | None, None]] = {}
    for _, name, config in plan.datasets:
        if name and mirror.is_hub_name(name):
            sets.setdefault(name, {})[config] = None
    return {name: list(configs) for name, configs in sets.items()}
