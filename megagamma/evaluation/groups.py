"""Averages over lm-eval's groups, by its own rules, from the records of their tasks."""

from __future__ import annotations

from typing import Any

from megagamma.evaluation import compat, continuous
from megagamma.evaluation.scoring import metrics_of
from megagamma.evaluation.tasks import Plan


def group_records(
    plan: Plan, records: dict[str, dict[str, Any]], failures: dict[str, str], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """Averages over groups, by lm-eval's own rules; continuous metrics weighted by the number of documents.

    Args:
        records: of the tasks that have been scored, by name.
        failures: gets a reason for every group of which a task has no score.
        common: what the records of one call share.
    """
    averages = []
    for group in plan.groups:
        names = [task.task_name for task in group.get_all_tasks()]
        lost = [name for name in names if name not in records]
        if not group.has_aggregation or not names:
            continue
        if lost:
            failures[group.name] = f"{len(lost)} of its {len(names)} tasks have no score"
            continue
        members = [records[name] for name in names]
        results = {record["task"]: _as_lm_eval(record) for record in members}
        values = compat.aggregate_group(group, list(continuous.NAMES), results)
        higher = {metric["metric"]: metric["higher_is_better"] for record in members for metric in record["metrics"]}
        metrics = metrics_of(values, higher)
        documents = sum(record["n"] for record in members)
        for metric in metrics:
            chances = [(_chance(record, metric["metric"]), record["n"]) for record in members]
            if all(chance is not None for chance, _ in chances):
                metric["chance"] = sum(chance * n for chance, n in chances if chance is not None) / documents
        shots = {record["fewshot"] for record in members}
        averages.append(
            {
                **common,
                "task": group.name,
                "task_version": group.version,
                "kind": "group",
                "fewshot": shots.pop() if len(shots) == 1 else None,
                "members": names,
                "n": documents,
                "n_total": sum(record["n_total"] for record in members),
                "subsampled": any(record["subsampled"] for record in members),
                "metrics": metrics,
            }
        )
    return averages


def _chance(record: dict[str, Any], name: str) -> float | None:
    metric: dict[str, Any] = next((metric for metric in record["metrics"] if metric["metric"] == name), {})
    return metric.get("chance")


def _as_lm_eval(record: dict[str, Any]) -> dict[str, Any]:
    """A record in the form that lm-eval's groups read."""
    results: dict[str, Any] = {"sample_len": record["n"]}
    for metric in record["metrics"]:
        name, filter_name, error = metric["metric"], metric["filter"], metric["stderr"]
        if metric["value"] is not None:
            results[f"{name},{filter_name}"] = metric["value"]
            results[f"{name}_stderr,{filter_name}"] = "N/A" if error is None else error
    return results
