"""Scores of several checkpoints or runs side by side: a curve over training, a table per gamma."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagamma.errors import EvaluationError
from megagamma.evaluation.scores import Scores, leading
from megagamma.files import write_text
from megagamma.reporting.plots import finish_axis, new_figure, save_figure
from megagamma.reporting.tables import csv_table, format_score, markdown_table


@dataclass
class Scored:
    """A checkpoint and its scores.

    Attributes:
        label: what it is called in tables.
        run: the run's name; checkpoints of one run make one line.
        step: optimizer steps.
        tokens: tokens seen; None where unknown.
        gamma: of the run's initialization; None where unknown.
        scores: of the checkpoint.
    """

    label: str
    run: str
    step: int
    tokens: int | None
    gamma: float | None
    scores: Scores


def _top_records(item: Scored) -> list[dict[str, Any]]:
    """The records that stand for the request: groups in place of their members, then single tasks."""
    groups = [record for record in item.scores.records if record["kind"] == "group"]
    members = {name for group in groups for name in group["members"]}
    inner = _inner_groups(groups)
    return [
        *(record for record in item.scores.records if record["kind"] == "task" and record["task"] not in members),
        *(group for group in groups if group["task"] not in inner),
    ]


def _inner_groups(groups: list[dict[str, Any]]) -> set[str]:
    """Groups all of whose members belong to a larger group."""
    return {
        group["task"]
        for group in groups
        if any(set(group["members"]) < set(other["members"]) for other in groups if other is not group)
    }


def _rows_of(item: Scored) -> Iterator[dict[str, Any]]:
    """The rows of one checkpoint, see `score_rows`."""
    for record in _top_records(item):
        for continuous in (False, True):
            entry = leading(record, continuous)
            if entry is None or entry["value"] is None:
                continue
            yield {
                "label": item.label,
                "run": item.run,
                "gamma": item.gamma,
                "step": item.step,
                "tokens": item.tokens,
                "task": record["task"],
                "metric": entry["metric"],
                "filter": entry["filter"],
                "value": entry["value"],
                "stderr": entry["stderr"],
                "chance": entry.get("chance"),
                "smooth": continuous,
                "fewshot": record["fewshot"],
                "n": record["n"],
                "subsampled": record["subsampled"],
                "prompts_sha256": record.get("prompts_sha256"),
            }


def score_rows(items: Iterable[Scored]) -> list[dict[str, Any]]:
    """One row per checkpoint, task and metric that stands for the task: its accuracy, and its continuous metric.

    Raises:
        EvaluationError: there are none.
    """
    rows = [row for item in items for row in _rows_of(item)]
    if not rows:
        raise EvaluationError("no scores to show: score at least one checkpoint on one task")
    return rows


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV."""
    return csv_table(list(rows[0]), rows)


def _columns(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["task"], row["metric"]) for row in rows))


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """A note for every column whose rows were not scored alike."""
    notes = []
    for task, metric in _columns(rows):
        column = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        kinds = {(row["fewshot"], row["n"]) for row in column}
        if len(kinds) > 1:
            kinds_text = ", ".join(f"{fewshot}-shot on {n} documents" for fewshot, n in sorted(kinds, key=str))
            notes.append(f"note: {task} {metric} was not scored alike everywhere: {kinds_text}")
        elif len({row["prompts_sha256"] for row in column}) > 1:
            notes.append(
                f"note: {task} {metric} was scored on other prompts here and there: other data, examples or seed"
            )
    return notes


def table(items: list[Scored], last_only: bool = False) -> str:
    """Checkpoints as rows, tasks as columns, as a Markdown table, by gamma, run and step.

    Args:
        items: scored checkpoints.
        last_only: one row per run, its last step: a table per gamma.
    """
    if last_only:
        last: dict[str, Scored] = {}
        for item in items:
            if item.run not in last or item.step > last[item.run].step:
                last[item.run] = item
        items = list(last.values())
    items = sorted(items, key=lambda item: (item.gamma is None, item.gamma or 0.0, item.run, item.step))
    rows = score_rows(items)
    columns = _columns(rows)
    continuous = {(row["task"], row["metric"]) for row in rows if row["smooth"]}
    subsampled = {(row["task"], row["metric"]) for row in rows if row["subsampled"]}
    names = [
        f"{task} {metric}{' ~' if (task, metric) in continuous else ''}{' *' if (task, metric) in subsampled else ''}"
        for task, metric in columns
    ]
    lines = []
    chances = {(row["task"], row["metric"]): row["chance"] for row in rows}
    if any(chance is not None for chance in chances.values()):
        lines.append(["chance", "-", "-", "-", *(format_score(chances[column]) for column in columns)])
    for item in items:
        by_column = {(row["task"], row["metric"]): row for row in _rows_of(item)}
        cells = [
            format_score(by_column[column]["value"], by_column[column]["stderr"]) if column in by_column else "-"
            for column in columns
        ]
        gamma = "-" if item.gamma is None else f"{item.gamma:g}"
        tokens = "-" if item.tokens is None else f"{item.tokens:,}"
        lines.append([item.label, gamma, f"{item.step:,}", tokens, *cells])
    text = markdown_table(["run", "gamma", "step", "tokens", *names], lines)
    legend = "~ continuous metric; +- one standard error"
    legend += "; * only a part of the set was scored" if subsampled else ""
    return "\n".join([text, legend, *_notes(rows)])


def plot(items: list[Scored], path: Path) -> None:
    """Every task's accuracy and continuous metric over steps, a line per run with its standard error, as a PNG."""
    rows = score_rows(items)
    columns = _columns(rows)
    width = min(len(columns), 4)
    figure, axes = new_figure(-(-len(columns) // width), width, 4.5, 3.5)
    for axis, (task, metric) in zip(axes.flat, columns, strict=False):
        column = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        for run in dict.fromkeys(row["run"] for row in column):
            line = sorted((row for row in column if row["run"] == run), key=lambda row: row["step"])
            gamma = line[0]["gamma"]
            axis.errorbar(
                [row["step"] for row in line],
                [row["value"] for row in line],
                yerr=[row["stderr"] or 0.0 for row in line],
                marker="o", markersize=3, capsize=2, label=run if gamma is None else f"{run} (gamma {gamma:g})",
            )  # fmt: skip
        if column[0]["chance"] is not None:
            axis.axhline(column[0]["chance"], color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(f"{task}, {column[0]['n']} documents", fontsize=9)
        finish_axis(axis, "step", metric, legend_size=7)
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_visible(False)
    save_figure(figure, path)


def write(items: list[Scored], folder: str | Path) -> str:
    """Write `scores.csv`, `scores.md` and `scores.png` of several checkpoints; returns the table."""
    folder = Path(folder)
    text = table(items)
    write_text(folder / "scores.csv", as_csv(score_rows(items)))
    write_text(folder / "scores.md", text + "\n")
    plot(items, folder / "scores.png")
    return text
