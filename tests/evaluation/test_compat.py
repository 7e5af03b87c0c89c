"""What this package needs of the private parts of lm-eval and `datasets`: after an upgrade, these tests fail first."""

from __future__ import annotations

import importlib
import inspect
import io
import logging
from pathlib import Path
from typing import Any

import pytest

from megagamma.evaluation import compat

YAML = "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: 0\n"


def manager(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A task with data, one whose data set does not exist, a group that changes it, a tag of both."""
    (tmp_path / "base").write_text(YAML)
    (tmp_path / "data.jsonl").write_text('{"q": "one", "c": ["a", "b"]}\n{"q": "two", "c": ["a", "b"]}\n')
    files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
    (tmp_path / "own.yaml").write_text(f"include: base\ntask: own\ntag: pair\n{files}")
    (tmp_path / "far.yaml").write_text("include: base\ntask: far\ntag: pair\ndataset_path: no/such_set\n")
    (tmp_path / "outer.yaml").write_text("group: outer\ntask: [own, {task: far, num_fewshot: 3}]\n")
    return tmp_path


def test_a_logger_logs_errors_only(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("some.library")
    with compat.suppress_logging("some.library"):
        logger.warning("of no use")
        logger.error("of use")
    logger.warning("of use again")
    assert [record.message for record in caplog.records] == ["of use", "of use again"]


@pytest.mark.parametrize(
    ("logger", "module", "attribute"),
    [
        (compat.INDEX_LOGGER, "lm_eval.tasks._index", "log"),
        (compat.MODEL_LOGGER, "lm_eval.models.huggingface", "eval_logger"),
        (compat.GROUP_LOGGER, "lm_eval.api.group", "eval_logger"),
    ],
)
def test_lm_eval_logs_under_these_names(logger: str, module: str, attribute: str) -> None:
    assert getattr(importlib.import_module(module), attribute).name == logger


def test_an_attribute_comes_back_after_an_error() -> None:
    class Owner:
        value = 1

        def fail(self) -> None:
            raise ValueError(self.value)

    with pytest.raises(ValueError, match="2"), compat.replaced_attribute(Owner, "value", 2):
        Owner().fail()
    assert Owner.value == 1


def test_progress_bars_of_requests_can_be_suppressed() -> None:
    import lm_eval.api.task as module

    def drawn() -> str:
        out = io.StringIO()
        assert list(module.tqdm(range(3), file=out)) == [0, 1, 2]
        return out.getvalue()

    assert "tqdm(" in inspect.getsource(module.Task.build_all_requests), "its bar is the tqdm of its module"
    assert drawn()
    with compat.suppress_progress_bars():
        assert drawn() == ""
    assert drawn()


def test_a_task_file_is_read_with_its_includes_and_without_its_code(tmp_path: Path) -> None:
    (tmp_path / "base").write_text(YAML)
    (tmp_path / "own.yaml").write_text("include: base\ntask: own\nprocess_docs: !function missing.function\n")
    content = compat.read_task_yaml(tmp_path / "own.yaml")
    assert (content["task"], content["test_split"]) == ("own", "test")
    (tmp_path / "own.yaml").write_text("task: [\n")
    with pytest.raises(Exception, match=r"own\.yaml"):
        compat.read_task_yaml(tmp_path / "own.yaml")


def test_file_formats_of_datasets() -> None:
    assert all(compat.is_file_format(name) for name in ("json", "parquet", "text", "csv"))
    assert not compat.is_file_format("openai/gsm8k") and not compat.is_file_format("squad")


def test_items_of_a_group(tasks: Path) -> None:
    first, second = compat.group_items(manager(tasks), "outer")
    assert first == "own" and (second["task"], second["num_fewshot"]) == ("far", 3)


def test_a_group_is_put_together_without_its_data(tasks: Path) -> None:
    from lm_eval.api.group import Group

    (group,) = compat.load_without_data(manager(tasks), "outer")
    assert isinstance(group, Group) and group.name == "outer"
    assert [task.task_name for task in group.get_all_tasks()] == ["own", "far"]
    own, far = (compat.definition_of(task) for task in group)
    assert own is not None and far is not None
    assert (own.name, own.folder, own.settings.get("num_fewshot")) == ("own", tasks, None)
    # What the group changes is not in the task's YAML.
    assert (far.settings["num_fewshot"], far.yaml.get("num_fewshot")) == (3, None)
    assert far.settings["dataset_path"] == "no/such_set"


def test_a_tag_is_a_list_of_tasks_without_their_data(tasks: Path) -> None:
    items = compat.load_without_data(manager(tasks), "pair")
    definitions = [compat.definition_of(item) for item in items]
    assert sorted(definition.name for definition in definitions if definition) == ["far", "own"]


def test_a_definition_builds_the_task(tasks: Path) -> None:
    (item,) = compat.load_without_data(manager(tasks), "own")
    definition = compat.definition_of(item)
    assert definition is not None
    task = definition.build()
    assert [doc["q"] for doc in task.eval_docs] == ["one", "two"]
    changed = compat.TaskDefinition(definition.entry, {**definition.overrides, "target_delimiter": ": "}).build()
    assert (task.config.target_delimiter, changed.config.target_delimiter) == (" ", ": ")
    # A task that was built is no definition.
    assert compat.definition_of(task) is None


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        ("lm_eval.evaluator", "evaluate", {"lm", "task_dict", "limit", "bootstrap_iters", "log_samples"}),
        ("lm_eval.tasks", "TaskManager", {"include_path", "include_defaults"}),
        ("lm_eval.api.instance", "Instance", {"request_type", "doc", "arguments", "idx", "metadata"}),
        ("lm_eval.config.group", "AggMetricConfig", {"metric", "aggregation", "weight_by_size"}),
        ("lm_eval.utils", "get_rolling_token_windows", {"token_list", "prefix_token", "max_seq_len", "context_len"}),
        ("lm_eval.utils", "make_disjoint_window", {"pair"}),
        ("lm_eval.models.utils", "postprocess_generated_text", {"generation", "stop", "think_end_token"}),
        ("lm_eval.models.utils", "handle_stop_sequences", {"until", "eos"}),
        ("lm_eval.models.utils", "normalize_gen_kwargs", {"gen_kwargs", "default_max_gen_toks"}),
    ],
)
def test_signatures_of_lm_eval(module: str, name: str, parameters: set[str]) -> None:
    here = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert parameters <= set(here), f"{module}.{name} takes {list(here)}"


def test_a_live_model_implements_all_that_lm_eval_calls() -> None:
    from lm_eval.api.model import TemplateLM

    from megagamma.evaluation.live import LiveModel

    assert not LiveModel.__abstractmethods__
    assert {"_loglikelihood_tokens", "tok_encode", "eot_token_id"} <= TemplateLM.__abstractmethods__
