"""What a report needs of runs, and which of them are arms of one comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagamma.config.io import as_dict
from megagamma.config.schema import Config
from megagamma.dynamics.analysis import records
from megagamma.errors import ConfigurationError
from megagamma.planning.flops import flops_per_token
from megagamma.runs.compare import RunRecord, read_run
from megagamma.runs.folder import RunFolder

# What tells runs apart without being compared.
_NAMES = {"run.name", "run.folder", "run.seed", "run.resume", "logging.wandb_group"}
_UNSEEN = (
    "logging.",
    "checkpoint.",
    "dynamics.",
    "run.timeout",
    "run.start",
    "run.threads",
    "data.cache",
    "data.verify",
)


@dataclass
class ReportRun(RunRecord):
    """A run's folder, read."""

    folder: RunFolder
    config: Config
    dynamics: list[dict[str, Any]]
    notes: list[str]
    """What cannot be shown of it, and why."""

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def flops_per_token(self) -> float:
        """For training, by `megagamma.planning.flops`."""
        return flops_per_token(self.config.model, self.config.data.sequence_length)


def read(path: Path) -> ReportRun:
    """Read a run's folder; one that is still running, was stopped or diverged is shown as far as it came.

    Raises:
        DataError: it is no run, or has no steps yet.
    """
    record, folder = read_run(path), RunFolder(path)
    metrics, config, events, notes = record.metrics, folder.read_config(), folder.events().read(), []
    kinds = [event.get("event") for event in events]
    if "end" not in kinds:
        notes.append(f"has not ended: shown up to step {metrics[-1]['step']}")
    losses = [line.get("loss") for line in metrics]
    broken = next((line["step"] for line, loss in zip(metrics, losses, strict=True) if loss is None), None)
    if broken is not None:
        notes.append(f"its loss was not finite at step {broken}")
    dynamics = records(folder)
    if not dynamics:
        how = "python tools/analyze_run.py" if folder.steps() else "it has no checkpoints: --dynamics.log_spaced true"
        notes.append(f"its weights were not measured ({how})")
    return ReportRun(record.name, record.gamma, metrics, record.samples, folder, config, dynamics, notes)


def _flat(config: Config) -> dict[str, Any]:
    found = {}
    for section, values in as_dict(config).items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            found[f"{section}.{key}" if key else section] = value
    return found


@dataclass
class Arm:
    """Runs that differ in their seed alone."""

    label: str
    runs: list[ReportRun]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})


def arms(runs: Sequence[ReportRun]) -> tuple[list[Arm], list[str]]:
    """(arms in the order of the runs, options that they differ in).

    Raises:
        ConfigurationError: one folder is given twice.
    """
    paths = [run.folder.path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ConfigurationError(f"{max(paths, key=paths.count)}: is given twice")
    flat = [_flat(run.config) for run in runs]
    options = [
        key
        for key in flat[0]
        if key not in _NAMES and not key.startswith(_UNSEEN) and any(one.get(key) != flat[0][key] for one in flat[1:])
    ]
    found: dict[str, Arm] = {}
    for run, values in zip(runs, flat, strict=True):
        label = ", ".join(f"{key.split('.')[-1]} {_short(values.get(key))}" for key in options) or run.name
        if not options and len(runs) > 1:
            label = "all"
        found.setdefault(label, Arm(label, [])).runs.append(run)
    return list(found.values()), options


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(one)}" for key, one in value.items()) + "}" if value else "none"
    return str(value)


def finite(value: Any) -> bool:
    """Whether a value of a line is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def thinned(points: Sequence[Any], most: int = 400) -> list[Any]:
    """At most so many points, evenly, the last one among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def describe(config: Config) -> dict[str, Any]:
    """Options of a run for its table, resolved."""
    return {
        "parameters": None,
        "layers": config.model.num_layers,
        "hidden size": config.model.hidden_size,
        "gate": config.model.attention_gate,
        "norm epsilon": f"{config.model.norm_epsilon:g}",
        "init": config.init.scheme + (f" {config.init.gamma:g}" if config.init.scheme == "gamma" else ""),
        "exponents": _short(config.init.exponents) if config.init.exponents else "",
        "learning rate": f"{config.optimizer.lr:g}",
        "sequence": config.data.sequence_length,
    }
