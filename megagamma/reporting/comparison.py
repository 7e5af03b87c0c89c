"""Runs side by side, for people: a table and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from megagamma.reporting.plots import finish_axis, new_figure, save_figure
from megagamma.reporting.tables import format_cell, markdown_table
from megagamma.runs.compare import RunRecord


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(columns, [[format_cell(row.get(column, "")) for column in columns] for row in rows])


def plot(runs: list[RunRecord], path: Path) -> None:
    """Training loss (smoothed over 1/50 of the run) and validation in bits per byte, over tokens, as a PNG."""
    names = sorted({name for run in runs for name in run.validation_names})
    figure, axes = new_figure(1, 1 + len(names), 6, 4)
    for run in runs:
        tokens, losses = run.curve("loss")
        width = max(1, len(losses) // 50)
        smoothed = [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
        label = f"{run.name} (gamma {run.gamma:g})"
        axes[0][0].plot(tokens, smoothed, label=label)
        for axis, name in zip(axes[0][1:], names, strict=True):
            axis.plot(*run.curve(f"val/{name}/bits_per_byte"), marker="o", markersize=3, label=label)
    titles = ["training loss [nats/token]", *(f"validation on {name} [bits/byte]" for name in names)]
    for axis, title in zip(axes[0], titles, strict=True):
        finish_axis(axis, "tokens", title)
    save_figure(figure, path)
