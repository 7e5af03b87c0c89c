"""The figures: what is drawn, how to read it, and its numbers. Drawn by plotly.js in the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megagamma.dynamics.analysis import turning_point
from megagamma.report.runs import Arm, ReportRun, finite, thinned
from megagamma.scaling.paired import interval

# Okabe and Ito's colours, which colour-blind people can tell apart: jfly.uni-koeln.de/color.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999")
_NEURONS = 48  # of a cosine map: more would make a page of many runs too large
DASHES = ("solid", "dash", "dot", "dashdot")

Mean = tuple[float, float, float]
"""Mean, low, high."""


@dataclass
class Figure:
    """One plot."""

    title: str
    reading: str
    """A sentence on how to read it."""
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    """Its data, for the CSV."""


def line_of(x: Sequence[Any], y: Sequence[Any], name: str, arm: int, **more: Any) -> dict[str, Any]:
    """A curve of an arm, by its place among the arms."""
    style = {"color": COLOURS[arm % len(COLOURS)], "dash": DASHES[arm // len(COLOURS) % len(DASHES)], "width": 2}
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "name": name, "line": style, **more}


def band_of(x: Sequence[Any], low: Sequence[float], high: Sequence[float], name: str, arm: int) -> dict[str, Any]:
    """The interval around a line of the same arm."""
    return {
        "type": "scatter", "mode": "lines", "x": [*x, *reversed(x)], "y": [*high, *reversed(low)], "fill": "toself",
        "fillcolor": COLOURS[arm % len(COLOURS)] + "33", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False,
        "legendgroup": name,
    }  # fmt: skip


_AXES: tuple[tuple[str, Callable[[ReportRun, dict[str, Any]], float]], ...] = (
    ("tokens", lambda _, line: float(line["tokens"])),
    ("FLOPs", lambda run, line: line["tokens"] * run.flops_per_token),
    ("seconds", lambda _, line: float(line["seconds"])),
)


def _over(title: str, reading: str, arms: Sequence[Arm], key: str, unit: str, smooth: bool) -> Figure | None:
    """A number of metrics.jsonl over tokens, FLOPs or time, which buttons choose."""
    traces, rows, first = [], [], True
    most = max(24, 1200 // sum(len(arm.runs) for arm in arms))  # so that the page stays small, whatever it holds
    for number, (axis, of) in enumerate(_AXES):
        for index, arm in enumerate(arms):
            for place, run in enumerate(arm.runs):
                lines = [line for line in run.metrics if finite(line.get(key)) and finite(line.get("tokens"))]
                if not lines:
                    continue
                values = [line[key] for line in lines]
                if smooth:
                    width = max(1, len(values) // 50)
                    values = [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
                points = thinned(list(zip([of(run, line) for line in lines], values, strict=True)), most)
                traces.append(
                    line_of(
                        [x for x, _ in points], [y for _, y in points], arm.label, index, visible=number == 0,
                        legendgroup=arm.label, showlegend=place == 0,
                        hovertemplate=f"%{{y:.4f}} {unit}<br>%{{x:.4g}} {axis}<br>{run.name}<extra></extra>",
                    )
                )  # fmt: skip
                if number == 0:
                    rows += [(arm.label, run.name, run.seed, x, y) for x, y in points]
                first = False
    if first:
        return None
    per_axis = len(traces) // len(_AXES)
    buttons = [
        {
            "label": axis, "method": "update",
            "args": [
                {"visible": [index // per_axis == number for index in range(len(traces))]},
                {"xaxis.title.text": axis},
            ],
        }
        for number, (axis, _) in enumerate(_AXES)
    ]  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "tokens"}}, "yaxis": {"title": {"text": unit}},
        "updatemenus": [{"buttons": buttons, "type": "buttons", "direction": "right", "x": 0, "y": 1.18, "xanchor": "left"}],
    }  # fmt: skip
    return Figure(title, reading, traces, layout, ("arm", "run", "seed", "tokens", key), rows)


def losses(arms: Sequence[Arm]) -> list[Figure]:
    """Training and validation loss."""
    found = [
        _over(
            "Training loss", "Lower is better; each line is a run, smoothed over a fiftieth of it. Buttons choose what the "
            "runs are compared at: the same tokens, the same compute, or the same time.", arms, "loss", "nats per token", True,
        )
    ]  # fmt: skip
    for name in sorted({name for arm in arms for run in arm.runs for name in run.validation_names}):
        found.append(
            _over(
                f"Validation on {name}", "Held-out loss of every validation, not smoothed.", arms, f"val/{name}/loss",
                "nats per token", False,
            )
        )  # fmt: skip
    return [figure for figure in found if figure is not None]


def differences(arms: Sequence[Arm], name: str) -> Figure | None:
    """Validation loss of every arm less that of the first, seed by seed, with the interval of the mean over seeds."""
    base = {run.seed: _by_step(run, f"val/{name}/loss") for run in arms[0].runs}
    traces, rows = [], []
    for index, arm in enumerate(arms[1:], 1):
        pairs = [(base[run.seed], _by_step(run, f"val/{name}/loss")) for run in arm.runs if run.seed in base]
        steps = sorted(set.intersection(*(set(one) & set(other) for one, other in pairs))) if pairs else []
        if not steps:
            continue
        band = [(step, *interval([other[step] - one[step] for one, other in pairs])) for step in steps]
        x, mean = [row[0] for row in band], [row[1] for row in band]
        if len(pairs) > 1:
            traces.append(band_of(x, [row[2] for row in band], [row[3] for row in band], arm.label, index))
        traces.append(line_of(x, mean, f"{arm.label} ({len(pairs)} seeds)", index, legendgroup=arm.label))
        rows += [(arm.label, len(pairs), *row) for row in band]
    if not traces:
        return None
    return Figure(
        f"Difference on {name} to {arms[0].label}",
        "Below zero the arm is ahead. The line is the mean over the seeds that both arms have, the band its 95 % interval over "
        "those seeds; with one seed there is no band, and it is not a finding.",
        traces,
        {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "nats per token"}, "zeroline": True}},
        ("arm", "seeds", "step", "mean", "low", "high"),
        rows,
    )


def _by_step(run: ReportRun, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in run.metrics if finite(line.get(key))}


def mean_by_key(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """Means over curves, by ascending step, layer or rank, where all of them have one."""
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    return {key: statistics.fmean(curve[key] for curve in curves) for key in shared}


def mean_over_seeds(arm: Arm, role: str, key: str) -> tuple[list[int], list[float]]:
    values: dict[int, list[float]] = {}
    for run in arm.runs:
        for line in run.dynamics:
            value = line["roles"].get(role, {}).get(key)
            if finite(value):
                values.setdefault(line["step"], []).append(value)
    steps = sorted(step for step, found in values.items() if len(found) == max(map(len, values.values())))
    return steps, [statistics.fmean(values[step]) for step in steps]


def baseline_of(arm: Arm, role: str, key: str) -> float | None:
    """Mean of a random matrix's number over a role's matrices."""
    for run in arm.runs:
        for line in run.dynamics:
            found = [
                line.get("baselines", {}).get("x".join(map(str, values.get("shape", []))), {}).get(key)
                for values in line["matrices"].values()
                if values.get("role") == role
            ]
            if found and all(finite(one) for one in found):
                return statistics.fmean(found)
    return None


def roles_of(arms: Sequence[Arm]) -> list[str]:
    """Roles of matrices that were measured, in the order of a model."""
    return list(
        dict.fromkeys(
            role
            for arm in arms
            for run in arm.runs
            for line in run.dynamics
            for role in line["roles"]
            if role != "norm"
        )
    )


def grid(names: Sequence[str], x: str, log_x: bool, log_y: bool = False) -> dict[str, Any]:
    """The layout of small plots, three beside each other, each with its name above it."""
    columns = 3
    height = -(-len(names) // columns)
    layout: dict[str, Any] = {
        "grid": {"rows": height, "columns": columns, "pattern": "independent", "ygap": 0.35}, "height": 210 * height + 110,
        "annotations": [], "legend": {"y": -70 / (210 * height)},
    }  # fmt: skip
    for place, name in enumerate(names):
        axis = axis_of(place)
        title = {"title": {"text": x}} if place >= len(names) - columns else {}
        layout[f"xaxis{axis}"] = {**({"type": "log"} if log_x else {}), **title}
        layout[f"yaxis{axis}"] = {"type": "log"} if log_y else {}
        layout["annotations"].append(
            {
                "text": name,
                "xref": f"x{axis} domain",
                "yref": f"y{axis} domain",
                "x": 0.5,
                "y": 1.12,
                "showarrow": False,
            }
        )
    return layout


def axis_of(place: int) -> str:
    """What plotly calls the axes of a small plot: nothing for the first, 2 for the second, ..."""
    return "" if place == 0 else str(place + 1)


def small(x: Sequence[Any], y: Sequence[Any], arm: Arm, index: int, place: int) -> dict[str, Any]:
    """A line with markers in a small plot; the legend names an arm once."""
    at = {"xaxis": f"x{axis_of(place)}", "yaxis": f"y{axis_of(place)}", "legendgroup": arm.label}
    return {**line_of(x, y, arm.label, index, showlegend=place == 0, **at), "mode": "lines+markers"}


def dots(arm: Arm, index: int, place: int, shown: dict[str, Mean], horizontal: bool, name: str) -> dict[str, Any]:
    """One arm's means with their intervals in a small plot, by category."""
    means = list(shown.values())
    low, high = ([abs(one[0] - one[side]) if finite(one[side]) else 0.0 for one in means] for side in (1, 2))
    values, kinds, axis = [one[0] for one in means], list(shown), "x" if horizontal else "y"
    colour = COLOURS[index % len(COLOURS)]
    return {
        "type": "scatter", "mode": "markers", "name": name, "legendgroup": arm.label, "showlegend": place == 0,
        "x": values if horizontal else kinds, "y": kinds if horizontal else values, "marker": {"color": colour, "size": 8},
        f"error_{axis}": {"type": "data", "symmetric": False, "array": high, "arrayminus": low, "color": colour, "width": 3},
        "xaxis": f"x{axis_of(place)}", "yaxis": f"y{axis_of(place)}",
    }  # fmt: skip


def by_role(arms: Sequence[Arm], key: str, title: str, reading: str, log_y: bool = False) -> Figure | None:
    """A number of dynamics.jsonl over steps: a small plot for each role, with the random matrix's and the turning point."""
    roles = [role for role in roles_of(arms) if any(mean_over_seeds(arm, role, key)[0] for arm in arms)]
    if not roles:
        return None
    layout = grid(roles, "step + 1", log_x=True, log_y=log_y)
    traces, rows = [], []
    for place, role in enumerate(roles):
        at = {"xaxis": f"x{axis_of(place)}", "yaxis": f"y{axis_of(place)}"}
        for index, arm in enumerate(arms):
            pairs = zip(*mean_over_seeds(arm, role, key), strict=True)
            shown = [(step, value) for step, value in pairs if value > 0 or not log_y]
            if not shown:
                continue
            steps, values = [step for step, _ in shown], [value for _, value in shown]
            traces.append(small([step + 1 for step in steps], values, arm, index, place))
            rows += [(role, arm.label, step, value) for step, value in shown]
            turn = turning_point(steps, values)
            if key == "condensation" and turn is not None:
                mark = {"symbol": "star", "size": 12, "color": COLOURS[index % len(COLOURS)]}
                traces.append(
                    {
                        "type": "scatter", "mode": "markers", "x": [turn + 1], "y": [max(values)], "marker": mark,
                        "showlegend": False, "hovertemplate": f"turns at step {turn}<extra></extra>",
                        "legendgroup": arm.label, **at,
                    }
                )  # fmt: skip
        baseline = baseline_of(arms[0], role, key)
        if baseline is not None:
            ends = [1, max(line["step"] for arm in arms for run in arm.runs for line in run.dynamics) + 1]
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "x": ends, "y": [baseline] * 2, "name": "a random matrix",
                    "line": {"color": "#888888", "dash": "dot", "width": 1}, "showlegend": place == 0,
                    "legendgroup": "random", **at,
                }
            )  # fmt: skip
    return Figure(title, reading, traces, layout, ("role", "arm", "step", key), rows)


def cosine_maps(arms: Sequence[Arm], role: str = "query") -> Figure | None:
    """Cosines between neurons of one matrix of the first layer, early, in the middle and late, one row an arm."""
    from megagamma.dynamics.matrices import ordered_cosines
    from megagamma.dynamics.sources import of_checkpoint

    found: list[tuple[str, int, Any]] = []
    for arm in arms[:3]:
        folder = arm.runs[0].folder
        steps = folder.steps()
        for step in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])) if steps else ():
            for parameter, state in of_checkpoint(folder.checkpoint(step)).states():
                if parameter.role == role:
                    found.append((arm.label, step, ordered_cosines(state["weight"], _NEURONS)))
                    break
    if not found:
        return None
    columns = min(3, len(found))
    height = -(-len(found) // columns)
    layout: dict[str, Any] = {
        "grid": {"rows": height, "columns": columns, "pattern": "independent", "ygap": 0.25}, "height": 270 * height + 60,
        "annotations": [],
    }  # fmt: skip
    traces, rows = [], []
    for place, (label, step, cosine) in enumerate(found):
        axis = "" if place == 0 else str(place + 1)
        values = [[round(float(one), 2) for one in row] for row in cosine]
        traces.append(
            {
                "type": "heatmap", "z": values, "zmin": -1, "zmax": 1, "colorscale": "RdBu", "reversescale": True,
                "showscale": place == 0, "xaxis": f"x{axis}", "yaxis": f"y{axis}",
                "hovertemplate": "cos %{z:.2f}<extra></extra>",
            }
        )  # fmt: skip
        layout[f"xaxis{axis}"] = {"visible": False}
        layout[f"yaxis{axis}"] = {"visible": False, "autorange": "reversed"}
        layout["annotations"].append(
            {
                "text": f"{label}, step {step}", "xref": f"x{axis} domain", "yref": f"y{axis} domain", "x": 0.5, "y": 1.1,
                "showarrow": False,
            }
        )  # fmt: skip
        rows += [(label, step, i, " ".join(map(str, row))) for i, row in enumerate(values)]
    return Figure(
        f"Cosines between neurons of the first layer's {role} matrix",
        "Each pixel is the cosine of two neurons' input weights, neurons in the order of the leading eigenvector: blocks and "
        f"stripes are neurons that have condensed onto one direction. At most {_NEURONS} neurons are shown.",
        traces,
        layout,
        ("arm", "step", "neuron", "cosines"),
        rows,
    )
