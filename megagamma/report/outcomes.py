"""Figures of what came out: gains by token, and scores of benchmarks."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from megagamma.dynamics.token_gains import another_seed, gains
from megagamma.dynamics.token_losses import TokenLosses, newest_kept, pieces_of
from megagamma.errors import MegagammaError
from megagamma.evaluation.scores import leading, read_scores
from megagamma.report.figures import Figure, Mean, axis_of, band_of, dots, grid, line_of
from megagamma.report.runs import Arm, ReportRun, finite
from megagamma.scaling.paired import interval


def _kept(run: ReportRun) -> TokenLosses | None:
    try:
        return newest_kept(run.folder)
    except MegagammaError as error:
        run.notes.append(f"its losses by token are left out: {error}")
        return None


def token_gains(arms: Sequence[Arm]) -> Figure | None:
    """What every arm gains on the first, by kinds of tokens, with intervals over seeds, or of one seed over sequences."""
    if len(arms) < 2:
        return None
    base = {run.seed: (run, losses) for run in arms[0].runs if (losses := _kept(run)) is not None}
    judges = {seed: losses for seed, (_, losses) in base.items()}
    found: list[tuple[int, int, dict[tuple[str, str], Mean]]] = []
    for index, arm in enumerate(arms[1:], 1):
        tables = []
        for run in arm.runs:
            if run.seed not in base or (losses := _kept(run)) is None:
                continue
            try:
                judge = another_seed(run.seed, judges)
                pieces = pieces_of(base[run.seed][0].folder)
                tables.append(gains(base[run.seed][1], losses, pieces, judge=judge))
            except MegagammaError as error:
                run.notes.append(f"its tokens are not compared with {arms[0].label}: {error}")
        if len(tables) == 1:
            found.append((index, 1, {(row.split, row.kind): (row.gain, row.low, row.high) for row in tables[0]}))
        elif tables:
            of = [{(row.split, row.kind): row.gain for row in table} for table in tables]
            shared = [key for key in of[0] if all(key in one for one in of)]
            found.append((index, len(tables), {key: interval([one[key] for one in of]) for key in shared}))
    if not found:
        return None
    splits = list(dict.fromkeys(split for _, _, table in found for split, _ in table))
    layout = grid(splits, "nats gained", log_x=False)
    layout["height"] = 330 * -(-len(splits) // 3)
    traces, rows = [], []
    for place, split in enumerate(splits):
        layout[f"yaxis{axis_of(place)}"] = {"type": "category", "autorange": "reversed", "tickfont": {"size": 10}}
        for index, seeds, table in found:
            over = f"{seeds} seeds" if seeds > 1 else "one seed: not a finding"
            shown = {kind: mean for (at, kind), mean in table.items() if at == split}
            traces.append(dots(arms[index], index, place, shown, True, f"{arms[index].label} ({over})"))
            rows += [(split, kind, arms[index].label, seeds, *mean) for kind, mean in shown.items()]
    return Figure(
        f"Gains on {arms[0].label} by kinds of tokens",
        "Right of zero the arm predicts these held-out tokens better, in nats per token. Intervals of 95 % are over seeds; "
        "with one seed they are over sequences, and it is not a finding. Kinds are told by the text and by the losses of the "
        "first arm's run of another seed; with one seed by its own, which favours the other where they are high.",
        traces,
        layout,
        ("split", "kind", "arm", "seeds", "gain", "low", "high"),
        rows,
    )


def _scored(run: ReportRun) -> dict[tuple[str, str], tuple[float, float]]:
    """(value, standard error over questions) by task and metric, of the newest step that was scored."""
    for path in sorted(Path(run.folder.path, "eval").glob("step_*/scores.json"), reverse=True):
        found = {}
        try:
            records = read_scores(path)
        except MegagammaError as error:
            run.notes.append(f"its scores are left out: {error}")
            return {}
        for record in records:
            for continuous in (False, True):
                entry = leading(record, continuous)
                if entry is not None and finite(entry["value"]):
                    error_of = entry["stderr"] if finite(entry.get("stderr")) else math.nan
                    found[str(record["task"]), str(entry["metric"])] = (entry["value"], error_of)
        if found:
            return found
    return {}


def scores(arms: Sequence[Arm]) -> Figure | None:
    """Scores of benchmarks, a small plot for each task and metric."""
    of_arms = [[one for run in arm.runs if (one := _scored(run))] for arm in arms]
    tasks = list(dict.fromkeys(key for runs in of_arms for one in runs for key in one))
    if not tasks:
        return None
    layout = grid([f"{task}: {metric}" for task, metric in tasks], "", log_x=False)
    traces, rows = [], []
    for place, key in enumerate(tasks):
        layout[f"xaxis{axis_of(place)}"] = {"showticklabels": False, "type": "category"}
        for index, (arm, runs) in enumerate(zip(arms, of_arms, strict=True)):
            values = [one[key] for one in runs if key in one]
            if not values:
                continue
            mean, low, high = interval([value for value, _ in values])
            if len(values) == 1:
                low, high = mean - 1.96 * values[0][1], mean + 1.96 * values[0][1]
            traces.append(dots(arm, index, place, {arm.label: (mean, low, high)}, False, arm.label))
            rows.append((*key, arm.label, len(values), mean, low, high))
    return Figure(
        "Scores of benchmarks",
        "At the newest checkpoint that was scored. Intervals of 95 % are over seeds; with one seed they are over a task's "
        "questions. choice_prob_norm: higher is better; answer_nats_per_byte: lower is better.",
        traces,
        layout,
        ("task", "metric", "arm", "seeds", "mean", "low", "high"),
        rows,
    )


def recorded(path: Path, title: str, reading: str) -> Figure:
    """Curves that were recorded earlier, means over seeds with intervals.

    Args:
        path: CSV with the columns arm, seed, tokens and loss, as in a sweep's table; loss in nats per token.
    """
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    traces, rows = [], []
    for index, arm in enumerate(dict.fromkeys(row["arm"] for row in table)):
        losses: dict[int, list[float]] = {}
        for row in table:
            if row["arm"] == arm:
                losses.setdefault(int(row["tokens"]), []).append(float(row["loss"]))
        band = [(tokens, *interval(losses[tokens])) for tokens in sorted(losses)]
        x = [row[0] for row in band]
        if all(len(one) > 1 for one in losses.values()):
            traces.append(band_of(x, [row[2] for row in band], [row[3] for row in band], arm, index))
        traces.append(
            line_of(x, [row[1] for row in band], f"{arm} ({len(losses[x[0]])} seeds)", index, legendgroup=arm)
        )
        rows += [(arm, len(losses[tokens]), tokens, *mean) for tokens, *mean in band]
    layout = {"xaxis": {"title": {"text": "tokens"}}, "yaxis": {"title": {"text": "nats per token"}}}
    return Figure(title, reading, traces, layout, ("arm", "seeds", "tokens", "mean", "low", "high"), rows)
