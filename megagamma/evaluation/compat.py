"""The private names of lm-eval and `datasets` that this package needs, each behind a function of ours.

Written for lm-eval 0.4.13 and datasets 5.2. tests/evaluation/test_compat.py asserts what each function needs, so that an
upgrade breaks there, and is fixed here.

Why lm-eval's public `TaskManager()` does not plan a request: it parses the 14,000 YAML files of lm-eval, and its `load`
reads the data of every task, which planning must not. Measured on two shared cores, beside 1.8 s for importing lm-eval:

    TaskManager()                           4.8 s of CPU time, 10 to 24 s elapsed
    plan(TaskRequest(["quick"]))            0.3 s of CPU time, 0.5 s elapsed
    plan(TaskRequest(["reasoning", "knowledge"]))   1.1 s of CPU time, 1.1 to 5.8 s elapsed
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# lm-eval's loggers whose warnings a user cannot act on.
INDEX_LOGGER = "lm_eval.tasks._index"  # folders that share a task's name
MODEL_LOGGER = "lm_eval.models.huggingface"  # every single prompt that is cut; the record of a task counts them
GROUP_LOGGER = "lm_eval.api.group"  # metrics that not all members of a group have


@contextlib.contextmanager
def suppress_logging(name: str) -> Iterator[None]:
    """Within it a logger logs errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it an attribute of a module or object has another value."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def suppress_progress_bars() -> Iterator[None]:
    """Within it lm-eval draws no progress bar while it builds requests.

    `Task.build_all_requests` has no option for it: it calls the `tqdm` of its module.
    """
    import lm_eval.api.task as module

    with replaced_attribute(module, "tqdm", functools.partial(module.tqdm, disable=True)):
        yield


def read_task_yaml(path: Path) -> dict[str, Any]:
    """The content of a task's YAML file with its includes; Python functions that it names are not imported.

    Publicly, lm-eval reads such a file only to build its task, and leaves out a broken one without a message.

    Raises:
        Exception: of any class, when the file cannot be read.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    content: dict[str, Any] = load_yaml(path, resolve_func=False)
    return content


def is_file_format(name: str) -> bool:
    """Whether `datasets.load_dataset` takes a name for a file format, such as json. `datasets` lists them privately."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return name in _PACKAGED_DATASETS_MODULES


def group_items(manager: Any, name: str) -> list[Any]:
    """The members of a group as its YAML file lists them: names, and dicts that change or define a task or group.

    `TaskManager` publishes the names of groups; what they refer to is only in the entries of its index.

    Args:
        manager: an `lm_eval.tasks.TaskManager`.
    """
    return list((manager.task_index[name].cfg or {}).get("task") or [])


@dataclass(frozen=True)
class TaskDefinition:
    """A task as lm-eval's index describes it, its data not read.

    lm-eval has no public form of a task without its data: `TaskManager.load` builds the task, and building reads them.

    Attributes:
        entry: of lm-eval's index.
        overrides: what replaces values of the task's YAML, such as those that a group sets.
    """

    entry: Any
    overrides: dict[str, Any]

    @property
    def yaml(self) -> dict[str, Any]:
        """Content of the task's YAML file; empty for a task that only Python code defines."""
        return dict(self.entry.cfg or {})

    @property
    def settings(self) -> dict[str, Any]:
        """The YAML's content with the overrides."""
        return {**self.yaml, **self.overrides}

    @property
    def name(self) -> str:
        """lm-eval's name of the task."""
        return str(self.settings["task"])

    @property
    def folder(self) -> Path | None:
        """Where the YAML file lies; None for a task that only Python code defines."""
        return None if self.entry.yaml_path is None else Path(self.entry.yaml_path).parent

    def build(self) -> Any:
        """The lm-eval task, its data read."""
        from lm_eval.tasks._factory import TaskFactory

        return TaskFactory()._build_task(self.entry, self.overrides)


@functools.cache
def _definition_class() -> Any:
    """The class that stands for a task in lm-eval's groups, which hold `Task` objects only."""
    from lm_eval.api.task import ConfigurableTask

    class UnloadedTask(ConfigurableTask):  # type: ignore[misc, unused-ignore]
        def __init__(self, definition: TaskDefinition) -> None:
            self.definition = definition

        @property
        def task_name(self) -> str:
            return self.definition.name

    return UnloadedTask


@functools.cache
def _planning_factory() -> Any:
    """A factory of lm-eval that puts groups together from tasks without data."""
    from lm_eval.tasks._factory import TaskFactory

    class PlanningFactory(TaskFactory):  # type: ignore[misc, unused-ignore]
        def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
            return _definition_class()(TaskDefinition(entry, dict(overrides or {})))

    return PlanningFactory()


def load_without_data(manager: Any, name: str) -> list[Any]:
    """What a name stands for: one `lm_eval.api.group.Group`, one task, or the tasks of a tag.

    Tasks have their `definition_of`; no data set is read.

    Args:
        manager: an `lm_eval.tasks.TaskManager` whose index has the name.

    Raises:
        Exception: of any class, when a YAML file cannot be used.
    """
    manager._factory = _planning_factory()
    loaded = manager.load([name])
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def definition_of(task: Any) -> TaskDefinition | None:
    """The definition of a task of `load_without_data`; None for one that is written inside a group's YAML."""
    return task.definition if isinstance(task, _definition_class()) else None
