"""Averages over lm-eval's groups, by its own rules, from the records of their tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megagamma.evaluation import compat, continuous
from megagamma.evaluation.scoring import metrics_of
from megagamma.evaluation.tasks import Plan


def group_records(
    made: Plan, known: dict[str, dict[str, Any]], failures: dict[str, str], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """Averages over groups, by lm-eval's own rules; smooth scores weighted by the number of documents."""
    from lm_eval.config.group import AggMetricConfig

    found = []
    for group in made.groups:
        names = [task.task_name for task in group.get_all_tasks()]
        lost = [name for name in names if name not in known]
        if not group.has_aggregation or not names:
            continue
        if lost:
            failures[group.name] = f"{len(lost)} of its {len(names)} tasks have no score"
            continue
        records = [known[name] for name in names]
        ours = [AggMetricConfig(metric=name, aggregation="mean", weight_by_size=True) for name in continuous.NAMES]
        with_ours = replace(group, aggregate_metric_list=[*group.aggregate_metric_list, *ours])
        with compat.suppress_logging(compat.GROUP_LOGGER):
            values = with_ours.aggregate({record["task"]: _as_lm_eval(record) for record in records})
        higher = {one["metric"]: one["higher_is_better"] for record in records for one in record["metrics"]}
        metrics = metrics_of(values, higher)
        sizes = sum(record["n"] for record in records)
        for one in metrics:
            chances = [(_chance(record, one["metric"]), record["n"]) for record in records]
            if all(chance is not None for chance, _ in chances):
                one["chance"] = sum(chance * n for chance, n in chances if chance is not None) / sizes
        shots = {record["fewshot"] for record in records}
        found.append(
            {
                **common,
                "task": group.name,
                "task_version": group.version,
                "kind": "group",
                "fewshot": shots.pop() if len(shots) == 1 else None,
                "members": names,
                "n": sizes,
                "n_total": sum(record["n_total"] for record in records),
                "subsampled": any(record["subsampled"] for record in records),
                "metrics": metrics,
            }
        )
    return found


def _chance(record: dict[str, Any], name: str) -> float | None:
    found: float | None = next((one.get("chance") for one in record["metrics"] if one["metric"] == name), None)
    return found


def _as_lm_eval(record: dict[str, Any]) -> dict[str, Any]:
    """A record in the form that lm-eval's groups read."""
    found: dict[str, Any] = {"sample_len": record["n"]}
    for one in record["metrics"]:
        if one["value"] is not None:
            found[f"{one['metric']},{one['filter']}"] = one["value"]
            found[f"{one['metric']}_stderr,{one['filter']}"] = "N/A" if one["stderr"] is None else one["stderr"]
    return found
