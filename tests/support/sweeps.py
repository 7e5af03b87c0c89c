"""A small sweep's file."""

from __future__ import annotations

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


def write(folder: Path, **changes: Any) -> Path:
    values = {**GOOD, **changes}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
