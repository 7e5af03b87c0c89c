"""What a sweep is: its axes and their arms, how points start, and which are ended early. `spec` reads it from a file."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUDGET = "budget"
"""Name of the axis of the budgets."""
SIZE_OPTIONS = ("model.hidden_size", "model.num_layers", "model.ffn_hidden_size", "model.num_attention_heads")
LENGTH_OPTIONS = ("run.tokens", "run.steps")
COLUMNS = (
    "sweep", "point", "hash", "status", "seed", "gamma", "hidden_size", "num_layers", "parameters", "non_embedding",
    "flops_per_token", "lr", "lr_tuned", "is_best", "steps", "attempts", "failures", "problem", "code", "commit", "device",
    "dtype", "world", "set", "step", "tokens", "flops", "is_last", "loss", "bits_per_byte", "train_loss", "training_seconds",
)  # fmt: skip
"""Columns of a sweep's table, but for those of its axes: no axis may have one of these names."""


@dataclass(frozen=True)
class Launch:
    """How a point is started."""

    processes: int = 1
    """Ranks of a point."""
    nodes: int = 1
    """Hosts under SLURM, which share the ranks equally."""
    time: str = ""
    """Time limit under SLURM, as sbatch takes it; empty: the partition's."""


@dataclass(frozen=True)
class Arm:
    """One value of an axis."""

    label: str
    """In names and tables."""
    value: Any
    """As the file gives it: the option's value, its factor, or the label of a named arm."""
    options: dict[str, Any]
    launch: dict[str, Any] = field(default_factory=dict)
    factor: float | None = None
    """Of the rule of the axis' option, in place of a value."""

    def has_key(self, key: Any) -> bool:
        """Whether a key of a YAML file means this arm: its value, or its label. A label such as 64 is a number there."""
        return (key == self.value and isinstance(key, bool) == isinstance(self.value, bool)) or str(key) == self.label


@dataclass(frozen=True)
class Axis:
    """A dimension of the grid."""

    name: str
    arms: tuple[Arm, ...]
    is_tuned: bool = False
    """Whether its best value counts, and not each."""
    option: str | None = None
    """The option that it sets; None for named arms."""

    @property
    def sets(self) -> set[str]:
        """Options that any of its arms sets."""
        return {name for arm in self.arms for name in arm.options} | ({self.option} if self.option else set())

    @property
    def is_size(self) -> bool:
        """Whether it changes the model's size or the length of a run."""
        return bool(self.sets & {*SIZE_OPTIONS, *LENGTH_OPTIONS}) or self.name == BUDGET


@dataclass(frozen=True)
class StopLost:
    """When a point of a tuned axis is ended before its end: its validation loss is behind the best of its group."""

    after: float
    """Share of the run before which none is ended."""
    margin: float
    """Unit: nats per token."""


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file describes it, checked as far as one can without its points."""

    name: str
    file: Path
    configs: tuple[Path, ...]
    options: dict[str, Any]
    axes: tuple[Axis, ...]
    """As the file gives them; see `grid`."""
    seeds: tuple[int, ...]
    rules: dict[str, dict[str, Any]]
    exclude: tuple[dict[str, str], ...]
    """Labels by axis; a point that has them all is left out."""
    budgets: tuple[float, ...]
    arms: tuple[str, ...]
    """Axes whose values are compared."""
    launch: Launch
    retries: int
    stop_lost: StopLost | None

    @functools.cached_property
    def grid(self) -> tuple[Axis, ...]:
        """The axes, that of the budgets last."""
        budgets = budget_axis(self.budgets)
        return (*self.axes, budgets) if budgets else self.axes


def budget_axis(budgets: tuple[float, ...]) -> Axis | None:
    """The axis of the budgets; None where there are none."""
    arms = tuple(Arm(f"{budget:g}".replace("+", ""), budget, {}) for budget in budgets)
    return Axis(BUDGET, arms) if arms else None


def label_of(value: Any) -> str:
    """A value as a part of a name: 0.004, true, bf16."""
    text = f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_") or "empty"
