"""What this project needs of lm-eval's and datasets' private names. An upgrade that takes one away fails here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from megagamma.evaluation import compat

TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: nowhere.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks with a tag, whose data set does not exist, and a group that changes a setting of them."""
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(TASK.replace("NAME", name) + "tag: both\n")
    (tmp_path / "pair.yaml").write_text(
        "group: pair\ntask: [first, {task: second, num_fewshot: 3}]\naggregate_metric_list:\n"
        "  - {metric: acc, aggregation: mean, weight_by_size: true}\nmetadata: {version: 2}\n"
    )
    return tmp_path


def test_loggers_are_those_that_lm_eval_warns_with() -> None:
    import lm_eval.api.group
    import lm_eval.models.huggingface
    import lm_eval.tasks._index

    assert lm_eval.tasks._index.log.name == compat.INDEX_LOGGER
    assert lm_eval.api.group.eval_logger.name == compat.GROUP_LOGGER
    assert lm_eval.models.huggingface.eval_logger.name == compat.MODEL_LOGGER


def test_suppress_logging(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(compat.GROUP_LOGGER)
    before = logger.level
    with compat.suppress_logging(compat.GROUP_LOGGER):
        logger.warning("hidden")
        logger.error("shown")
    logger.warning("after")
    with pytest.raises(ZeroDivisionError), compat.suppress_logging(compat.GROUP_LOGGER):
        raise ZeroDivisionError
    assert logger.level == before
    assert [record.message for record in caplog.records] == ["shown", "after"]


def test_replaced_attribute() -> None:
    class Owner:
        value = 1

    with compat.replaced_attribute(Owner, "value", 2):
        assert Owner.value == 2
    assert Owner.value == 1
    with pytest.raises(ZeroDivisionError), compat.replaced_attribute(Owner, "value", 2):
        raise ZeroDivisionError
    assert Owner.value == 1
    with pytest.raises(AttributeError, match="missing"), compat.replaced_attribute(Owner, "missing", 2):
        pass


def test_stock_folder_holds_the_yamls_in_a_folder_per_family() -> None:
    folder = compat.stock_folder()
    assert (folder / "arc" / "arc_easy.yaml").is_file()
    assert sum(1 for _ in folder.rglob("*.yaml")) > 5000


def test_read_task_yaml_leaves_functions_unresolved(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a\nprocess_docs: !function missing.module\n")
    assert compat.read_task_yaml(tmp_path / "a.yaml")["process_docs"].endswith("missing.module")
    (tmp_path / "a.yaml").write_text("task: [\n")
    with pytest.raises(Exception, match="flow"):
        compat.read_task_yaml(tmp_path / "a.yaml")


def test_index_entries(folder: Path) -> None:
    manager = compat.task_manager([str(folder)], include_defaults=False)
    task, group, tag = (compat.index_entry(manager, name) for name in ("first", "pair", "both"))
    assert task and group and tag and compat.index_entry(manager, "arc_easy") is None
    assert (task.kind, task.settings["dataset_path"]) == ("task", "json")
    assert (group.kind, group.settings["task"]) == ("group", ["first", {"task": "second", "num_fewshot": 3}])
    assert (tag.kind, tag.settings) == ("tag", {})
    assert set(manager.all_tasks) == {"first", "second", "pair", "both"}


def test_later_folders_win_without_a_warning(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "first.yaml").write_text(TASK.replace("NAME", "first").replace("json", "csv"))
    manager = compat.task_manager([str(folder), str(other)], include_defaults=False)
    entry = compat.index_entry(manager, "first")
    assert entry and entry.settings["dataset_path"] == "csv" and not caplog.records


def test_tasks_load_without_their_data(folder: Path) -> None:
    manager = compat.task_manager([str(folder)], include_defaults=False)
    factory = manager._factory
    pair = compat.load_unread(manager, "pair")["groups"]["pair"]
    assert manager._factory is factory
    first, second = list(pair)
    assert compat.is_unread(first) and not compat.is_unread(pair)
    assert [task.task_name for task in pair.get_all_tasks()] == ["first", "second"]
    assert (first.folder, first.settings["output_type"]) == (folder, "multiple_choice")
    assert second.overrides["num_fewshot"] == second.settings["num_fewshot"] == 3
    assert pair.has_aggregation and pair.version == "2"
    assert sorted(compat.load_unread(manager, "both")["tasks"]) == ["first", "second"]
    # Its data are read when it is built, and only then.
    with pytest.raises(FileNotFoundError, match="nowhere"):
        compat.build_task(first.entry, first.overrides)


def test_built_tasks_have_what_scoring_uses(folder: Path) -> None:
    from support.benchmarks import write_own_task

    write_own_task(folder, "own", 4)
    manager = compat.task_manager([str(folder)], include_defaults=False)
    unread = compat.load_unread(manager, "own")["tasks"]["own"]
    files = {"dataset_kwargs": {"data_files": {"test": str(folder / "own.jsonl")}}}
    task: Any = compat.build_task(unread.entry, {**unread.overrides, **files})
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1)
    assert len(task.eval_docs) == 4 and task.OUTPUT_TYPE == "multiple_choice" and task.multiple_input == 0
    document = task.eval_docs[0]
    assert task.doc_to_choice(document)[task.doc_to_target(document)]
    assert task.config.target_delimiter == " " and not task.doc_to_prefix(document)
    assert task.higher_is_better()["acc"] is True
    # What one task changes in its config does not reach the next of the same plan.
    overrides = {**unread.overrides, **files, "metadata": {"version": 1, "notes": ["x"]}}
    compat.build_task(unread.entry, overrides).config.metadata["notes"].append("y")
    assert compat.build_task(unread.entry, overrides).config.metadata["notes"] == ["x"]


def test_aggregate_group_by_its_rules_and_further_metrics_by_size(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = compat.task_manager([str(folder)], include_defaults=False)
    group = compat.load_unread(manager, "pair")["groups"]["pair"]
    results = {
        "first": {"sample_len": 10, "acc,none": 0.5, "acc_stderr,none": 0.1, "loss,none": 1.0, "loss_stderr,none": 0.2},
        "second": {"sample_len": 30, "acc,none": 0.1, "acc_stderr,none": 0.1, "loss,none": 3.0},
    }
    values = compat.aggregate_group(group, ["loss", "unknown"], results)
    assert values["acc,none"] == pytest.approx(0.2) and values["acc_stderr,none"] > 0
    assert values["loss,none"] == pytest.approx(2.5) and values["loss_stderr,none"] == "N/A"
    assert len(group.aggregate_metric_list) == 1, "the group stays as it is"
    assert not caplog.records


def test_generation_limits() -> None:
    assert compat.generation_limits({"until": ["a", ""], "max_gen_toks": 9}, 256) == (["a"], 9)
    assert compat.generation_limits({"until": "a"}, 256) == (["a"], 256)
    assert compat.generation_limits({"max_new_tokens": 7, "do_sample": False, "temperature": 0.0}, 256) == ([], 7)


def test_cut_at_stop() -> None:
    assert compat.cut_at_stop("one\n\ntwo;", [";", "\n\n"]) == "one"
    assert compat.cut_at_stop("one", ["x"]) == "one"


def test_rolling_sequences_score_every_token_once() -> None:
    tokens = list(range(100, 123))
    pairs = compat.rolling_sequences(tokens, 0, 8)
    assert [token for _, continuation in pairs for token in continuation] == tokens
    assert pairs[0] == ([0], tokens[:8])
    assert all(context and len(context) + len(continuation) <= 9 for context, continuation in pairs)


def test_without_progress_bars(capfd: pytest.CaptureFixture[str]) -> None:
    import lm_eval.api.task as module

    bar = module.tqdm
    with compat.without_progress_bars():
        assert list(module.tqdm([1, 2])) == [1, 2]
    assert module.tqdm is bar and capfd.readouterr().err == ""
    assert list(module.tqdm([1, 2])) == [1, 2]
    assert "2/2" in capfd.readouterr().err, "negative control: it is this name that draws them"


def test_file_formats_are_no_data_sets_of_the_hub() -> None:
    assert compat.is_file_format("json") and compat.is_file_format("parquet")
    assert not compat.is_file_format("gsm8k") and not compat.is_file_format("openai/gsm8k")


def test_private_names_are_used_nowhere_else(root: Path) -> None:
    private = ("lm_eval.tasks._", "lm_eval.models.utils", "lm_eval.utils", "lm_eval.config", "._build_task", "._factory",
               "_PACKAGED_DATASETS_MODULES", "unittest")  # fmt: skip
    for path in sorted((root / "megagamma").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "compat.py" or path.parent.name != "evaluation":
            assert [name for name in private if name in text] == [], path
