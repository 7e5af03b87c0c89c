"""Runs side by side: where they ended, and their curves, as numbers. Reads only the runs' folders."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagamma.errors import DataError
from megagamma.runs.folder import RunFolder


@dataclass
class RunRecord:
    """What a comparison needs of a run's folder."""

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


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        DataError: it is not one, or holds no steps yet.
    """
    run = RunFolder(folder).require_run()
    metrics = [line for line in run.metrics().read() if isinstance(line.get("step"), int)]
    if not metrics:
        raise DataError(f"{folder}: metrics.jsonl has no steps yet: train first")
    return RunRecord(run.name, run.read_config().init.gamma, metrics, run.samples().read())


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
