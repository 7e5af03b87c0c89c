"""Private and internal names of lm-eval, and of `datasets`: nothing else in this project uses them.

Written against lm-eval 0.4.13. tests/evaluation/test_compat.py checks what each function needs, so that an
upgrade that takes it away fails there. Every function explains why the public API does not suffice.

Why names of tasks are not simply given to the public `TaskManager()`: it parses all 14,000 YAML files of lm-eval, which
took 4.6 to 5.4 s of CPU time, and 14 to 22 s on 2 cores busy with other work; and its `load` then reads every data set.
Planning here indexes only the folders that define the requested names and reads no data: 0.3 s of CPU time for the preset
`quick`, 1.2 s for `reasoning` and `knowledge` together.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Loggers that are silenced where they would repeat what is handled here.
INDEX_LOGGER = "lm_eval.tasks._index"
GROUP_LOGGER = "lm_eval.api.group"
MODEL_LOGGER = "lm_eval.models.huggingface"


@contextlib.contextmanager
def suppress_logging(name: str) -> Iterator[None]:
    """Without the warnings of a logger: lm-eval has no option for them."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of a module's attribute, for as long as the block runs."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


# -- names of tasks ----------------------------------------------------------------------------------------------------


def stock_folder() -> Path:
    """Folder of lm-eval's own task YAMLs; public is only the index of all of them, see above."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def read_task_yaml(path: Path) -> Any:
    """The settings in a task's YAML file, Python functions not imported.

    `TaskManager` leaves out a file that it cannot read, without a word.

    Raises:
        Exception: of many kinds: the file cannot be read.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=False)


def task_manager(folders: Sequence[str], include_defaults: bool) -> Any:
    """A `TaskManager` over some folders, of which later ones win, without warnings about names that they share."""
    from lm_eval.tasks import TaskManager

    with suppress_logging(INDEX_LOGGER):
        return TaskManager(include_path=list(folders) or None, include_defaults=include_defaults)


@dataclass(frozen=True)
class IndexEntry:
    """What an index knows of a name.

    Attributes:
        kind: task, group or tag.
        settings: content of its YAML; empty for a tag.
    """

    kind: str
    settings: dict[str, Any]


def index_entry(manager: Any, name: str) -> IndexEntry | None:
    """What a `TaskManager` knows of a name, or None.

    `TaskManager.task_index` is public, the type of its values is not.
    """
    from lm_eval.tasks._index import Kind

    entry = manager.task_index.get(name)
    if entry is None:
        return None
    kind = {Kind.TAG: "tag", Kind.GROUP: "group"}.get(entry.kind, "task")
    return IndexEntry(kind, entry.cfg or {})


@functools.cache
def _unread_task_class() -> type:
    from lm_eval.api.task import ConfigurableTask

    class UnreadTask(ConfigurableTask):
        """Stands for a task whose data set is not read, so that lm-eval can put its groups together.

        Attributes:
            entry: lm-eval's, for `build_task`.
            overrides: settings that a group changes.
            settings: of the task, overrides included.
            folder: of its YAML, or None.
        """

        def __init__(self, entry: Any, overrides: dict[str, Any]) -> None:
            # Not super().__init__(), which reads the data set.
            self.entry, self.overrides = entry, overrides
            self.settings = {**(entry.cfg or {}), **overrides}
            self.folder = Path(entry.yaml_path).parent if entry.yaml_path is not None else None

        @property
        def task_name(self) -> str:
            return str(self.settings["task"])

    return UnreadTask


def is_unread(item: Any) -> bool:
    """Whether an item is a task from `load_unread`; one that a group defines by itself is not."""
    return isinstance(item, _unread_task_class())


def load_unread(manager: Any, name: str) -> Any:
    """`TaskManager.load` of one name, but no data set is read: its tasks have what `UnreadTask` describes.

    `TaskManager.load` has no such option: it builds every task, and building reads the data set.
    """
    from lm_eval.tasks._factory import TaskFactory

    class Factory(TaskFactory):
        def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
            return _unread_task_class()(entry, dict(overrides or {}))

    with replaced_attribute(manager, "_factory", Factory()):
        return manager.load([name])


def build_task(entry: Any, overrides: dict[str, Any]) -> Any:
    """The lm-eval task of an entry that `load_unread` gave, its data set read.

    `TaskManager.load` would build it without the settings that its group changes.
    """
    from lm_eval.tasks._factory import TaskFactory

    # A task may change its config later, and would change what the next one of the same plan is built from.
    return TaskFactory()._build_task(entry, copy.deepcopy(overrides))


# -- averages over groups ----------------------------------------------------------------------------------------------


def aggregate_group(group: Any, metrics: Sequence[str], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Averages of a group by its own rules, and of further metrics weighted by the number of documents.

    lm-eval averages only what a group's YAML lists, inside its `evaluate`, over tasks scored in one call.

    Args:
        group: an `lm_eval.api.group.Group`.
        results: `metric,filter` -> value, their `metric_stderr,filter`, and `sample_len`, by task.
    """
    from lm_eval.config.group import AggMetricConfig

    further = [AggMetricConfig(metric=name, aggregation="mean", weight_by_size=True) for name in metrics]
    # It would warn of a metric that only some tasks have.
    with suppress_logging(GROUP_LOGGER):
        values: dict[str, Any] = replace(
            group, aggregate_metric_list=[*group.aggregate_metric_list, *further]
        ).aggregate(results)
    return values


# -- what lm-eval's `hf` model does with a request ---------------------------------------------------------------------


def generation_limits(options: dict[str, Any], default: int) -> tuple[list[str], int]:
    """(stop texts, most tokens) of a task's generation_kwargs, as lm-eval's `hf` model reads them.

    The rules are helpers of its models and no part of its API for them.

    Args:
        default: tokens where the options name no number.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    values = normalize_gen_kwargs(dict(options), default)
    stop = [text for text in handle_stop_sequences(values.get("until"), eos=None) if text]
    return stop, int(values["max_gen_toks"])


def cut_at_stop(text: str, stop: list[str]) -> str:
    """A generated text up to the first stop text, as lm-eval's `hf` model cuts it; no part of its API either."""
    from lm_eval.models.utils import postprocess_generated_text

    return str(postprocess_generated_text(text, stop, None))


def rolling_sequences(tokens: list[int], first: int, length: int) -> list[tuple[list[int], list[int]]]:
    """A long text as (context, continuation) pairs that fit in a model, each token scored once, as lm-eval cuts it.

    Args:
        first: token before the text.
        length: context length of the model. Unit: tokens.
    """
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    return [make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, first, length, context_len=1)]


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Without lm-eval's progress bars while it builds requests, for which it has no option.

    They belong on the console of a command, and not of a training run.
    """
    import lm_eval.api.task as module

    with replaced_attribute(module, "tqdm", functools.partial(module.tqdm, disable=True)):
        yield


# -- datasets ----------------------------------------------------------------------------------------------------------


def is_file_format(name: str) -> bool:
    """Whether `datasets.load_dataset(name)` reads local files of a format, such as json; it lists them nowhere public."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return name in _PACKAGED_DATASETS_MODULES
