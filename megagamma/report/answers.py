"""The figure of runs on tasks whose answers are known: what was answered, over training."""

from __future__ import annotations

from collections.abc import Sequence

from megagamma.report.figures import Figure, grid, mean_by_key, small
from megagamma.report.runs import Arm, ReportRun, finite


def shares_of(run: ReportRun) -> dict[str, dict[int, float]]:
    """Shares of questions by step, by what stands in metrics.jsonl: val/<set>/<answer>."""
    found: dict[str, dict[int, float]] = {}
    if not run.config.data.toy:
        return found
    for line in run.metrics:
        for key, value in line.items():
            if key.startswith("val/") and not key.endswith("/loss") and finite(value):
                found.setdefault(key, {})[line["step"]] = value
    return found


def answers(arms: Sequence[Arm]) -> Figure | None:
    """Of toys: the share of each named answer in each set, over steps; means over seeds."""
    of_arms = [[shares_of(run) for run in arm.runs] for arm in arms]
    names = list(dict.fromkeys(key for runs in of_arms for shares in runs for key in shares))
    if not names:
        return None
    titles = [f"{key.split('/')[1]}: {key.split('/')[2]}".replace("_", " ") for key in names]
    layout = grid(titles, "step", log_x=False)
    traces, rows = [], []
    for place, (key, title) in enumerate(zip(names, titles, strict=True)):
        for index, (arm, runs) in enumerate(zip(arms, of_arms, strict=True)):
            curve = mean_by_key([shares[key] for shares in runs if key in shares])
            if curve:
                traces.append(small(list(curve), list(curve.values()), arm, index, place))
                rows += [(title, arm.label, step, value) for step, value in curve.items()]
    return Figure(
        "Answers over training",
        "The share of questions of each set that were answered so. docs/toys.md says what sets and answers are.",
        traces,
        layout,
        ("set and answer", "arm", "step", "share"),
        rows,
    )
