"""Runs side by side: a table of where they ended, and their loss curves. Reads only the runs' folders."""

from __future__ import annotations

import contextlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagamma.config.io import load_config
from megagamma.errors import DataError
from megagamma.reporting.plots import finish_axis, new_figure, save_figure
from megagamma.reporting.tables import format_cell, markdown_table


@dataclass
class RunRecord:
    """What a run's folder tells."""

    name: str
    gamma: float
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets that were measured."""
        keys = {key.split("/")[1] for line in self.metrics for key in line if key.startswith("val/")}
        return sorted(keys)

    def last(self, key: str) -> float | None:
        """Last recorded value of a metric."""
        values = [line[key] for line in self.metrics if line.get(key) is not None]
        return values[-1] if values else None

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Tokens and values of a metric."""
        lines = [line for line in self.metrics if line.get(key) is not None]
        return [line["tokens"] for line in lines], [line[key] for line in lines]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, less one that a run is writing now or that a kill cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        DataError: it is not one, or holds no steps yet.
    """
    if not (folder / "config.yaml").exists():
        raise DataError(f"{folder}: not the folder of a run: config.yaml is missing")
    metrics = _lines(folder / "metrics.jsonl")
    if not metrics:
        raise DataError(f"{folder}: metrics.jsonl has no steps yet: train first")
    return RunRecord(
        folder.name, load_config(folder / "config.yaml").init.gamma, metrics, _lines(folder / "samples.jsonl")
    )


def comparison(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """One row per run: gamma, steps, tokens, training loss, validation, speed."""
    rows = []
    for run in runs:
        row: dict[str, Any] = {
            "run": run.name,
            "gamma": run.gamma,
            "steps": run.metrics[-1]["step"],
            "tokens": run.metrics[-1]["tokens"],
            "train_loss": run.last("loss"),
        }
        for name in run.validation_names:
            row[f"{name}_nats_per_token"] = run.last(f"val/{name}/loss")
            row[f"{name}_bits_per_byte"] = run.last(f"val/{name}/bits_per_byte")
        speeds = [line["tokens_per_second"] for line in run.metrics if line.get("tokens_per_second")]
        row["tokens_per_second"] = statistics.median(speeds)
        row["minutes"] = run.metrics[-1]["seconds"] / 60
        rows.append(row)
    return rows


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
