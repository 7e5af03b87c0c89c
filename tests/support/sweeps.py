"""A small sweep's file, and what its table says."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import yaml

GOOD: dict[str, Any] = {
    "name": "study",
    "config": "configs/smoke.yaml",
    "axes": {
        "size": {"d32": {"model.hidden_size": 32}, "d64": {"model": {"hidden_size": 64}}},
        "init.gamma": [0.5, 1.0],
    },
    "seeds": [1, 2],
    "rules": {"optimizer.lr": {"rule": "power", "of": "hidden_size", "at": 64, "value": 0.004, "exponent": -0.5}},
}
# Where and how often a point was started is not its result.
NOT_RESULTS = ("attempts", "failures", "problem", "code", "commit", "training_seconds")


def write(folder: Path, **changes: Any) -> Path:
    values = {**GOOD, **changes}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def write_study(folder: Path, cache: str, base: dict[str, Any], **changes: Any) -> Path:
    """A sweep of configs/smoke.yaml that is really run.

    Args:
        cache: of its data.
        base: entries of the file; the options of its `set`, and of the `set` among the changes, are added up.
    """
    settings = {"data.cache": cache, "logging.sample_tokens": 0, **base.get("set", {}), **changes.pop("set", {})}
    values = {"name": "study", "config": "configs/smoke.yaml", **base, **changes, "set": settings}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def table(state: Path) -> list[dict[str, str]]:
    """Rows of a sweep's table.csv, without what is no result."""
    with open(state / "table.csv") as file:
        return [{key: row[key] for key in row if key not in NOT_RESULTS} for row in csv.DictReader(file)]
