"""A sweep's results as one tidy table: a row for every validation of every point."""

from __future__ import annotations

import math
import statistics
from typing import Any

from megagamma.errors import MegagammaError
from megagamma.files import atomic_file, write_text
from megagamma.planning.flops import flops_per_token, parameter_counts
from megagamma.reporting.plots import finish_axis, new_figure, save_figure
from megagamma.reporting.tables import csv_table
from megagamma.runs.folder import RunFolder
from megagamma.scaling.folder import PointState, SweepFolder
from megagamma.scaling.grid import Sweep
from megagamma.scaling.options import is_number
from megagamma.scaling.paired import interval
from megagamma.scaling.tuning import (
    best_values,
    final_loss,
    is_chosen,
    losses_by_tokens,
    some,
    tuned_learning_rates,
    validation_key,
)

_LEGEND = 12  # names that a legend has room for


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
            "is_best": is_chosen(point, best),
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


def draw(folder: SweepFolder, sweep: Sweep, states: list[PointState]) -> None:
    """Draw the validation losses as a PNG: over tokens, at the end, and over the values of a tuned axis if there is one.

    Lines are means over seeds, bands and bars their 95 % intervals. Of a tuned axis the first two panels have the best values.

    Raises:
        MegagammaError: the file cannot be written.
    """
    ended = [state for state in states if final_loss(state) is not None and validation_key(state.metrics)]
    if not ended:
        return
    best, _ = best_values(sweep, states)
    shown: dict[str, list[PointState]] = {}
    for state in ended:
        if is_chosen(state.point, best):
            shown.setdefault(state.point.comparison, []).append(state)
    tuned = next(
        (axis for axis in sweep.axes if axis.is_tuned and all(is_number(arm.value) for arm in axis.arms)), None
    )
    figure, axes = new_figure(1, 2 + (tuned is not None), 5.5, max(4.0, 0.22 * len(shown)))
    for place, (name, members) in enumerate(shown.items()):
        colour = f"C{place % 10}"
        _draw_curve(axes[0][0], members, name if len(shown) <= _LEGEND else "", colour)
        losses = [loss for member in members if (loss := final_loss(member)) is not None]
        mean, low, _ = interval(losses)
        axes[0][1].errorbar(
            mean, -place, xerr=None if math.isnan(low) else mean - low, color=colour, marker="o", capsize=3
        )
        axes[0][1].plot(losses, [-place] * len(losses), ".", color="grey", markersize=3)
    axes[0][1].margins(y=0.2)
    axes[0][1].set_yticks([-place for place in range(len(shown))], list(shown), fontsize=7)
    finish_axis(axes[0][0], "tokens", "validation loss [nats/token]", 7)
    finish_axis(axes[0][1], "final validation loss [nats/token]", "", 7)
    if tuned is not None:
        for place, name in enumerate(shown):
            of: dict[float, list[float]] = {}
            for state in ended:
                loss = final_loss(state)
                if state.point.comparison == name and loss is not None:
                    of.setdefault(float(state.point.values[tuned.name]), []).append(loss)
            values = sorted(of)
            means = [statistics.fmean(of[value]) for value in values]
            axes[0][2].plot(
                values, means, marker="o", color=f"C{place % 10}", label=name if len(shown) <= _LEGEND else None
            )
        axes[0][2].set_xscale("log")
        tried = sorted({float(arm.value) for arm in tuned.arms})
        axes[0][2].set_xticks(tried, [f"{value:g}" for value in tried])
        axes[0][2].minorticks_off()
        finish_axis(axes[0][2], tuned.name, "final validation loss [nats/token]", 7)
    save_figure(figure, folder.figure_file)


def _draw_curve(axis: Any, members: list[PointState], label: str, colour: str) -> None:
    """Validation loss over tokens, where all seeds have one."""
    key = validation_key(members[0].metrics) or "loss"
    curves = [losses_by_tokens(member, key) for member in members]
    tokens = sorted(set.intersection(*map(set, curves)))
    bands = [interval([curve[one] for curve in curves]) for one in tokens]
    axis.plot(tokens, [mean for mean, _, _ in bands], marker="o", markersize=3, color=colour, label=label or None)
    if len(members) > 1:
        axis.fill_between(tokens, [low for _, low, _ in bands], [high for _, _, high in bands], color=colour, alpha=0.2)
