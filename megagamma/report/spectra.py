"""Figures of spectra, of how far weights condensed, and of the embeddings' geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megagamma.dynamics.matrices import spectrum_ranks
from megagamma.report.figures import (
    Figure,
    Mean,
    axis_of,
    baseline_of,
    by_role,
    dots,
    grid,
    mean_by_key,
    roles_of,
    small,
)
from megagamma.report.runs import Arm, ReportRun, finite
from megagamma.scaling.paired import interval

Curve = dict[int, float]
"""A singular value over the root mean square of all of them, by rank."""


def _curve(values: Sequence[float], shape: Sequence[int], norm: float) -> Curve:
    count = min(shape)
    scale = norm / math.sqrt(count)
    return dict(zip(spectrum_ranks(count), [value / scale for value in values], strict=True)) if scale > 0 else {}


def _of_run(run: ReportRun, role: str) -> tuple[Curve, Curve]:
    """(at the last measurement, of random matrices), means over a role's matrices."""
    own: list[Curve] = []
    random: list[Curve] = []
    for line in reversed(run.dynamics):
        for values in line["matrices"].values():
            if values.get("role") == role and "singular_values" in values and "norm" in values:
                shape = values["shape"]
                own.append(_curve(values["singular_values"], shape, values["norm"]))
                baseline = line["baselines"].get("x".join(map(str, shape)), {})
                if "singular_values" in baseline:
                    random.append(_curve(baseline["singular_values"], shape, math.sqrt(shape[0] * shape[1])))
        if own:
            break
    return mean_by_key(own), mean_by_key(random)


def spectra(arms: Sequence[Arm]) -> Figure | None:
    """Singular values by rank at the last measurement, a small plot for each role."""
    found = {role: [[_of_run(run, role) for run in arm.runs] for arm in arms] for role in roles_of(arms)}
    roles = [role for role, curves in found.items() if any(own for arm in curves for own, _ in arm)]
    if not roles:
        return None
    traces: list[dict[str, Any]] = []
    rows: list[tuple[Any, ...]] = []
    for place, role in enumerate(roles):
        random: Curve = {}
        for index, (arm, curves) in enumerate(zip(arms, found[role], strict=True)):
            mean = mean_by_key([own for own, _ in curves if own])
            random = random or mean_by_key([one for _, one in curves if one])
            shown = {rank: value for rank, value in mean.items() if value > 0}
            traces.append({**small(list(shown), list(shown.values()), arm, index, place), "mode": "lines"})
            rows += [(role, arm.label, rank, value) for rank, value in mean.items()]
        if random:
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "x": list(random), "y": list(random.values()),
                    "name": "a random matrix",
                    "line": {"color": "#888888", "dash": "dot", "width": 1}, "showlegend": place == 0,
                    "legendgroup": "random", "xaxis": f"x{axis_of(place)}", "yaxis": f"y{axis_of(place)}",
                }
            )  # fmt: skip
            rows += [(role, "a random matrix", rank, value) for rank, value in random.items()]
    return Figure(
        "Singular values at the last measurement",
        "By rank, over the root mean square of all of a matrix's: the steeper, the fewer directions carry it. Means over a "
        "role's matrices and over seeds; the dotted line is a random matrix of the same shape.",
        traces,
        grid(roles, "rank", log_x=True, log_y=True),
        ("role", "arm", "rank", "singular value"),
        rows,
    )


def peaks(arms: Sequence[Arm]) -> Figure | None:
    """Each role's largest condensation over a random matrix's, with its interval over seeds, and where it ended."""
    traces: list[dict[str, Any]] = []
    rows: list[tuple[Any, ...]] = []
    for index, arm in enumerate(arms):
        shown: dict[str, Mean] = {}
        for role in roles_of([arm]):
            random = baseline_of(arm, role, "condensation")
            curves = [_condensation(run, role) for run in arm.runs]
            curves = [curve for curve in curves if len(curve) > 1]
            if not random or not curves:
                continue
            tops = [max(curve, key=curve.__getitem__) for curve in curves]
            shown[role] = interval([curve[top] / random for curve, top in zip(curves, tops, strict=True)])
            ends = interval([curve[max(curve)] / random for curve in curves])
            rows.append((role, arm.label, len(curves), *shown[role], *ends, min(tops), max(tops)))
        if shown:
            traces.append(dots(arm, index, 0, shown, False, arm.label))
    if not rows:
        return None
    return Figure(
        "How far each role condensed",
        "The largest mean |cosine| on the way over that of a random matrix, 1 where there is none; intervals of 95 % are "
        "over seeds. The data also say where it ended, and at which step it was largest in the first and in the last seed.",
        traces,
        {"yaxis": {"title": {"text": "over a random matrix"}, "type": "log"}, "xaxis": {"type": "category"}},
        (
            "role",
            "arm",
            "seeds",
            "peak",
            "low",
            "high",
            "end",
            "end low",
            "end high",
            "first peak step",
            "last peak step",
        ),
        rows,
    )


def _condensation(run: ReportRun, role: str) -> dict[int, float]:
    found = {line["step"]: line["roles"].get(role, {}).get("condensation") for line in run.dynamics}
    return {step: value for step, value in found.items() if finite(value)}


def embeddings(arms: Sequence[Arm]) -> list[Figure]:
    """Geometry of the most frequent tokens' embeddings and head rows, over steps."""
    of = "Of the 200 most frequent tokens of held-out text; the dotted line is random rows."
    found = [
        by_role(
            arms, "signature_correlation", "Do embeddings follow what comes next?",
            "Correlation between the cosines of tokens' embeddings and those of the distributions of their next tokens: 1 "
            f"where tokens with the same followers lie alike. {of}",
        ),
        by_role(
            arms, "frequent_cosine", "Mean cosine between embeddings",
            f"Above the dotted line embeddings share a direction. {of}",
        ),
        by_role(
            arms, "first_axis_share", "Share of the first principal axis",
            f"How much of the embeddings' variance lies on one line. {of}",
        ),
    ]  # fmt: skip
    return [figure for figure in found if figure is not None]
