"""Scores of several checkpoints or runs side by side: a curve over training, a table per gamma."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagamma.errors import EvaluationError
from megagamma.evaluation.scores import Scores, leading, number
from megagamma.files import write_text


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


def _asked(item: Scored) -> list[dict[str, Any]]:
    """The records that stand for what was asked: groups in place of their members, then single tasks."""
    groups = [record for record in item.scores.records if record["kind"] == "group"]
    members = {name for group in groups for name in group["members"]}
    top = [group for group in groups if group["task"] not in _inner_groups(groups)]
    return [
        *(record for record in item.scores.records if record["kind"] == "task" and record["task"] not in members),
        *top,
    ]


def _inner_groups(groups: list[dict[str, Any]]) -> set[str]:
    """Groups all of whose members belong to a larger group."""
    found = set()
    for one in groups:
        for other in groups:
            if one is not other and set(one["members"]) < set(other["members"]):
                found.add(one["task"])
    return found


def rows(items: Iterable[Scored]) -> list[dict[str, Any]]:
    """One row per checkpoint, task and metric that stands for the task: its accuracy, and its smooth score."""
    found = []
    for item in items:
        for record in _asked(item):
            for smooth in (False, True):
                one = leading(record, smooth)
                if one is None or one["value"] is None:
                    continue
                found.append(
                    {
                        "label": item.label,
                        "run": item.run,
                        "gamma": item.gamma,
                        "step": item.step,
                        "tokens": item.tokens,
                        "task": record["task"],
                        "metric": one["metric"],
                        "filter": one["filter"],
                        "value": one["value"],
                        "stderr": one["stderr"],
                        "chance": one.get("chance"),
                        "smooth": smooth,
                        "fewshot": record["fewshot"],
                        "n": record["n"],
                        "subsampled": record["subsampled"],
                        "prompts_sha256": record.get("prompts_sha256"),
                    }
                )
    if not found:
        raise EvaluationError("no scores to show: score at least one checkpoint on one task")
    return found


def as_csv(found: list[dict[str, Any]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in found)
    return text.getvalue()


def _columns(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["task"], row["metric"]) for row in found))


def _comparable(found: list[dict[str, Any]]) -> list[str]:
    """A note for every column whose rows were not scored alike."""
    notes = []
    for task, metric in _columns(found):
        here = [row for row in found if (row["task"], row["metric"]) == (task, metric)]
        kinds = {(row["fewshot"], row["n"]) for row in here}
        if len(kinds) > 1:
            said = ", ".join(f"{fewshot}-shot on {n} documents" for fewshot, n in sorted(kinds, key=str))
            notes.append(f"note: {task} {metric} was not scored alike everywhere: {said}")
        elif len({row["prompts_sha256"] for row in here}) > 1:
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
    found = rows(items)
    columns = _columns(found)
    smooth = {(row["task"], row["metric"]) for row in found if row["smooth"]}
    part = {(row["task"], row["metric"]) for row in found if row["subsampled"]}
    names = [
        f"{task} {metric}{' ~' if (task, metric) in smooth else ''}{' *' if (task, metric) in part else ''}"
        for task, metric in columns
    ]
    head = ["run", "gamma", "step", "tokens", *names]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    chances = {(row["task"], row["metric"]): row["chance"] for row in found}
    if any(chance is not None for chance in chances.values()):
        cells = [number(chances[column]) for column in columns]
        lines.append("| " + " | ".join(["chance", "-", "-", "-", *cells]) + " |")
    for item in items:
        mine = {(row["task"], row["metric"]): row for row in rows([item])} if _asked(item) else {}
        cells = [number(mine[c]["value"], mine[c]["stderr"]) if c in mine else "-" for c in columns]
        gamma = "-" if item.gamma is None else f"{item.gamma:g}"
        tokens = "-" if item.tokens is None else f"{item.tokens:,}"
        lines.append("| " + " | ".join([item.label, gamma, f"{item.step:,}", tokens, *cells]) + " |")
    lines += ["~ smooth score; +- one standard error" + ("; * only a part of the set was scored" if part else "")]
    return "\n".join(lines + _comparable(found))


def plot(items: list[Scored], path: Path) -> None:
    """Every task's accuracy and smooth score over steps, a line per run with its standard error, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = rows(items)
    columns = _columns(found)
    width = min(len(columns), 4)
    height = -(-len(columns) // width)
    figure, axes = plt.subplots(height, width, figsize=(4.5 * width, 3.5 * height), squeeze=False)
    for axis, (task, metric) in zip(axes.flat, columns, strict=False):
        here = [row for row in found if (row["task"], row["metric"]) == (task, metric)]
        for run in dict.fromkeys(row["run"] for row in here):
            line = sorted((row for row in here if row["run"] == run), key=lambda row: row["step"])
            gamma = line[0]["gamma"]
            axis.errorbar(
                [row["step"] for row in line],
                [row["value"] for row in line],
                yerr=[row["stderr"] or 0.0 for row in line],
                marker="o", markersize=3, capsize=2, label=run if gamma is None else f"{run} (gamma {gamma:g})",
            )  # fmt: skip
        if here[0]["chance"] is not None:
            axis.axhline(here[0]["chance"], color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(f"{task}, {here[0]['n']} documents", fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel(metric)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(columns) :]:
        axis.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(items: list[Scored], folder: str | Path) -> str:
    """Write `scores.csv`, `scores.md` and `scores.png` of several checkpoints; returns the table."""
    folder = Path(folder)
    text = table(items)
    write_text(folder / "scores.csv", as_csv(rows(items)))
    write_text(folder / "scores.md", text + "\n")
    plot(items, folder / "scores.png")
    return text
