"""Averages over groups from the records of their tasks, without a model."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.group import Group
from lm_eval.config.group import AggMetricConfig

from megagamma.evaluation.groups import group_records
from megagamma.evaluation.tasks import Plan, TaskRequest


class NamedGroup(Group):
    """A group of tasks that are only names."""

    def get_all_tasks(self, recursive: bool = True) -> Any:
        return [type("Task", (), {"task_name": name}) for name in self.child_names]


def plan(*names: str, averages: bool = True) -> Plan:
    metrics = [AggMetricConfig(metric="acc", aggregation="mean", weight_by_size=False)] if averages else None
    group = NamedGroup("pair", aggregate_metric_list=metrics, metadata={"version": 3})
    group._children = dict.fromkeys(names)
    return Plan(TaskRequest(["pair"]), [], [group], {"pair": list(names)})


def record(task: str, n: int, accuracy: float | None, loss: float, **more: Any) -> dict[str, Any]:
    common = {"filter": "none", "stderr": 0.1, "chance": 0.25}
    metrics = [
        {"metric": "acc", "value": accuracy, "higher_is_better": True, "smooth": False, **common},
        {"metric": "answer_nats_per_byte", "value": loss, "higher_is_better": False, "smooth": True, **common},
    ]
    return {"task": task, "n": n, "n_total": 10, "subsampled": n < 10, "fewshot": 0, "metrics": metrics, **more}


def test_averages() -> None:
    records = {"a": record("a", 10, 0.5, 1.0), "b": record("b", 5, 0.2, 4.0)}
    failures: dict[str, str] = {}
    (found,) = group_records(plan("a", "b"), records, failures, {"seed": 1})
    assert failures == {} and (found["task"], found["kind"], found["task_version"], found["seed"]) == (
        "pair",
        "group",
        "3",
        1,
    )
    assert (found["n"], found["n_total"], found["subsampled"], found["fewshot"]) == (15, 20, True, 0)
    accuracy, loss = found["metrics"]
    assert accuracy["value"] == pytest.approx(0.35), "the group's own rule: not weighted"
    assert loss["value"] == pytest.approx(2.0) and loss["smooth"], "ours: weighted by the documents"
    assert accuracy["chance"] == loss["chance"] == pytest.approx(0.25)
    assert (accuracy["higher_is_better"], loss["higher_is_better"]) == (True, False)


def test_tasks_of_different_examples_and_a_metric_without_chance() -> None:
    second = record("b", 10, 0.2, 4.0, fewshot=5)
    second["metrics"][0]["chance"] = None
    (found,) = group_records(plan("a", "b"), {"a": record("a", 10, 0.5, 1.0), "b": second}, {}, {})
    assert found["fewshot"] is None and "chance" not in found["metrics"][0] and "chance" in found["metrics"][1]


def test_a_group_with_a_task_that_has_no_score() -> None:
    failures: dict[str, str] = {}
    assert group_records(plan("a", "b"), {"a": record("a", 10, 0.5, 1.0)}, failures, {}) == []
    assert failures == {"pair": "1 of its 2 tasks have no score"}
    # A group that has no average of its own gets none, and that is no failure.
    assert group_records(plan("a", "b", averages=False), {}, failures := {}, {}) == [] and failures == {}
