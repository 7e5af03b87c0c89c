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
from megagamma.scaling.grid import Sweep
from megagamma.scaling.tuning import best_values, final_loss, some, tuned_learning_rates


def rows_of(sweep: Sweep, states: list[PointState]) -> list[dict[str, Any]]:
    """The table: points in the order of the sweep, their validations by step; a point without any has one row."""
    best, _ = best_values(sweep, states)
    is_tuned = tuned_learning_rates(sweep, [state.point for state in states])
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
            **{axis.name: point.values[axis.name] for axis in sweep.grid},
            "seed": point.seed,
            "gamma": config.init.gamma,
            "hidden_size": config.model.hidden_size,
            "num_layers": config.model.num_layers,
            "parameters": counts.total,
            "non_embedding": counts.non_embedding,
            "flops_per_token": per_token,
            "lr": config.optimizer.lr,
            "lr_tuned": is_tuned[point.comparison],
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


def machine_warnings(states: list[PointState]) -> list[str]:
    """Warnings about finished points that ran otherwise than each other where the config leaves it open, one line each.

    A point's content is its config and data, so what a laptop finished in fp32 counts as finished for a GPU too.
    """
    places: dict[str, dict[str, list[str]]] = {"device": {}, "dtype": {}}
    warnings = []
    for state in states:
        if state.status != "done":
            continue
        config, processes, ran = state.point.config, state.point.launch.processes, _resolved(state)
        for key, given in (("device", config.run.device), ("dtype", config.precision.dtype)):
            if given == "auto" and ran[key] is not None:
                places[key].setdefault(ran[key], []).append(state.point.name)
        if ran["world"] != processes:
            other = f"world {ran['world']} where launch.processes is {processes}"
            places.setdefault(other, {}).setdefault("", []).append(state.point.name)
    for key, option in (("device", "run.device"), ("dtype", "precision.dtype")):
        values = places.pop(key)
        if len(values) > 1:
            text = "; ".join(f"{value}: {some(names, 3)}" for value, names in sorted(values.items()))
            warnings.append(
                f"finished points differ in {key} ({text}): their losses may differ by it: set {option}, and run them again"
            )
    return warnings + [f"finished points ran with {other}: {some(names[''], 3)}" for other, names in places.items()]


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
