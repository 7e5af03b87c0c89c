"""A sweep's results as one tidy table: a row for every validation of every point."""

from __future__ import annotations

import statistics
from typing import Any

from megagamma.errors import MegagammaError
from megagamma.files import atomic_file, write_text
from megagamma.planning.flops import flops_per_token, parameter_counts
from megagamma.reporting.tables import csv_table
from megagamma.runs.folder import RunFolder
from megagamma.scaling.folder import PointState, SweepFolder
from megagamma.scaling.points import axes_of
from megagamma.scaling.spec import Sweep


def first_set(metrics: list[dict[str, Any]]) -> str:
    """Key of the loss on the first validation set; that of training where nothing was validated."""
    keys = [key for line in metrics for key in line if key.startswith("val/") and key.endswith("/loss")]
    return keys[0] if keys else "loss"


def final_loss(state: PointState) -> float | None:
    """Validation loss at the end of a finished point; None for any other. Unit: nats per token."""
    if state.status != "done":
        return None
    name = first_set(state.metrics)
    return next((line[name] for line in reversed(state.metrics) if line.get(name) is not None), None)


def best_values(sweep: Sweep, states: list[PointState]) -> tuple[dict[str, str], list[str]]:
    """Of every group of tuned points, the best values by the mean over seeds of the final validation loss.

    A value without a finished point of every seed is none of the candidates; one that diverged never is.

    Returns:
        Name without seed of the best point by `Point.tuning_group` without its seed; and warnings: values that are best
        at an edge of their grid, and groups without a result.
    """
    tuned = [axis for axis in sweep.axes if axis.is_tuned]
    groups: dict[str, dict[str, list[PointState]]] = {}
    for state in states:
        groups.setdefault(state.point.comparison, {}).setdefault(state.point.group, []).append(state)
    best, warnings = {}, []
    for group, candidates in groups.items() if tuned else ():
        means = {}
        for name, members in candidates.items():
            losses = [final_loss(member) for member in members]
            if all(loss is not None for loss in losses):
                means[name] = statistics.fmean(losses)  # type: ignore[arg-type]
        if not means:
            warnings.append(
                f"{group}: no value of {', '.join(a.name for a in tuned)} has finished points of every seed"
            )
            continue
        best[group] = min(means, key=lambda name: means[name])
        member = candidates[best[group]][0].point
        for axis in tuned:
            # Of the values that are there for this group: others may be excluded.
            there = [
                arm.label
                for arm in axis.arms
                if any(s[0].point.labels[axis.name] == arm.label for s in candidates.values())
            ]
            edge = len(there) > 1 and member.labels[axis.name] in (there[0], there[-1])
            if edge or len(there) == 1:
                side = "lower" if member.labels[axis.name] == there[0] else "upper"
                why = f"lies at the {side} edge of its grid" if edge else "is the only one"
                warnings.append(
                    f"{group}: the best {axis.name}, {member.values[axis.name]}, {why}: the optimum may lie beyond: add values"
                )
    return best, warnings


def rows_of(sweep: Sweep, states: list[PointState]) -> list[dict[str, Any]]:
    """The table: points in the order of the sweep, their validations by step; a point without any has one row."""
    best, _ = best_values(sweep, states)
    axes = axes_of(sweep)
    has_tuned_lr = any(axis.is_tuned and "optimizer.lr" in axis.sets for axis in sweep.axes)
    rows = []
    for state in states:
        point, config = state.point, state.point.sized
        counts = parameter_counts(config.model)
        per_token = flops_per_token(config.model, config.data.sequence_length)
        fixed: dict[str, Any] = {
            "sweep": sweep.name,
            "point": point.name,
            "hash": state.hash[:16],
            "status": state.status,
            **{axis.name: point.values[axis.name] for axis in axes},
            "seed": point.seed,
            "gamma": config.init.gamma,
            "hidden_size": config.model.hidden_size,
            "num_layers": config.model.num_layers,
            "parameters": counts.total,
            "non_embedding": counts.non_embedding,
            "flops_per_token": per_token,
            "lr": config.optimizer.lr,
            "lr_tuned": has_tuned_lr,
            "is_best": not point.tuned or best.get(point.comparison) == point.group,
            "steps": point.steps,
            "attempts": state.attempts,
            "failures": state.failures,
            "problem": state.problem,
            "code": " ".join(code[:16] for code in state.codes),
            "commit": state.commit,
            **_resolved(state),
        }
        measured = [line for line in state.metrics if any(key.startswith("val/") for key in line)]
        sets = list(dict.fromkeys(k.split("/")[1] for line in measured for k in line if k.startswith("val/")))
        found = [
            {
                **fixed, "set": name, "step": line["step"], "tokens": line["tokens"], "flops": per_token * line["tokens"],
                "is_last": line["step"] == point.steps, "loss": line.get(f"val/{name}/loss"),
                "bits_per_byte": line.get(f"val/{name}/bits_per_byte"), "train_loss": line.get("loss"),
                "training_seconds": line.get("seconds"),
            }
            for line in measured
            for name in sets
            if f"val/{name}/loss" in line
        ]  # fmt: skip
        rows += found or [{**fixed, "step": state.step, "is_last": False}]
    return rows


def _resolved(state: PointState) -> dict[str, Any]:
    """Where and how a point ran, from its own files."""
    try:
        resolved = RunFolder(state.folder).read_resolved()
    except MegagammaError:
        return {"device": None, "dtype": None, "world": state.point.launch.processes}
    return {"device": resolved["device"], "dtype": resolved["dtype"], "world": resolved["parallel"]["world"]}


def write_table(folder: SweepFolder, rows: list[dict[str, Any]]) -> None:
    """Write the table as CSV and as parquet.

    Raises:
        MegagammaError: a file cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_text(folder.csv_file, csv_table(columns, rows))
    arrays = {}
    for column in columns:
        values = [row.get(column) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [None if value is None else str(value) for value in values]
        elif kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        arrays[column] = pyarrow.array(values)
    with atomic_file(folder.parquet_file, "wb") as file:
        parquet.write_table(pyarrow.table(arrays), file)


def summary(sweep: Sweep, states: list[PointState]) -> list[dict[str, Any]]:
    """One row per point without its seed: mean and standard deviation over seeds of the final validation loss."""
    best, _ = best_values(sweep, states)
    groups: dict[str, list[PointState]] = {}
    for state in states:
        groups.setdefault(state.point.group, []).append(state)
    rows = []
    for name, members in groups.items():
        losses = [loss for loss in map(final_loss, members) if loss is not None]
        diverged = sum(member.status == "diverged" for member in members)
        rows.append(
            {
                "point": name,
                "seeds": f"{len(losses)}/{len(members)}" + (f", {diverged} diverged" if diverged else ""),
                "lr": members[0].point.config.optimizer.lr,
                "loss": statistics.fmean(losses) if losses else None,
                "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
                "best": best.get(members[0].point.comparison) == name,
            }
        )
    return rows
