"""What was drawn, or what there is now, beside the targets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagamma.adapters.blocks import MATRIX_ROLES, Plan
from megagamma.config.schema import InitConfig
from megagamma.errors import InitializationError
from megagamma.initialization.gamma import ModelShape, asked, effective_gamma
from megagamma.initialization.report import (
    MatrixReport,
    NormSaturation,
    WeightStatistics,
    as_json,
    by_role,
    check,
    measure,
    norm_saturation,
    saturation_lines,
    table,
)
from megagamma.model.parameters import LogicalParameter


def targets(plan: Plan, init: InitConfig) -> dict[str, tuple[int, float]]:
    """d_in and target std of every logical matrix, by its name."""
    shape = ModelShape(plan.hidden_size, plan.num_layers)
    return {name: asked(init, one.role, one.shape, shape) for name, one in plan.logical().items()}


def _finite(value: Any) -> Any:
    """JSON has no word for what is not a number: null."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Report:
    """Of one process: of a matrix that lies on several, its part of it. `gathered` puts them together."""

    plan: Plan
    init: InitConfig
    statistics: dict[str, WeightStatistics]
    """Sums over what this process holds of each logical matrix; nothing where the model has no memory yet."""
    is_drawn: bool
    """False: the weights are as they were found."""
    kept: dict[str, str] = field(default_factory=dict)
    """Parameters that the model's own code has set, and why they stay."""

    @property
    def matrices(self) -> list[MatrixReport]:
        """One row per logical matrix that has been measured, in the model's order."""
        logical, rows = self.plan.logical(), []
        for name, (inputs, std) in targets(self.plan, self.init).items():
            if name in self.statistics:
                one = logical[name]
                rows.append(measure(name, one.role, one.shape, inputs, std, self.statistics[name], self.init))
        return rows

    @property
    def roles(self) -> list[MatrixReport]:
        """One row per role and target std, its matrices pooled."""
        order = {role: number for number, role in enumerate(MATRIX_ROLES)}
        return sorted(by_role(self.matrices, self.init), key=lambda row: order[row.role])

    @property
    def norms(self) -> list[NormSaturation]:
        """Expected input of the norms at step 0 by the target stds; empty where the model's epsilon is not known."""
        plan, stds = self.plan, self._target_by_role()
        if not plan.epsilon or "embedding" not in stds:
            return []
        qk_norm = plan.qk_norm and {"query", "key"} <= set(stds)
        return norm_saturation(plan.hidden_size, plan.epsilon, qk_norm, stds, plan.input_scale)

    def _target_by_role(self) -> dict[str, float]:
        logical = self.plan.logical()
        return {logical[name].role: std for name, (_, std) in targets(self.plan, self.init).items()}

    def table(self, by: str = "role") -> str:
        """The report as text, a line per role, or per matrix with `by="matrix"`.

        Of weights as they were found: their std and the exponent that it amounts to, and what would be drawn.
        """
        rows = self.matrices if by == "matrix" else self.roles
        if self.is_drawn:
            return table(rows)
        if not rows:
            return self._targets_only()
        lines = [
            f"{'matrices':<22}{'shape':>18}{'d_in':>8}{'std now':>13}{'gamma now':>11}{'target std':>13}{'gamma':>8}"
        ]
        for row in rows:
            now = effective_gamma(row.measured_std, row.d_in)
            shape = "x".join(map(str, row.shape))
            lines.append(
                f"{row.name:<22}{shape:>18}{row.d_in:>8}{row.measured_std:>13.4e}{now:>11.3f}{row.asked_std:>13.4e}"
                f"{row.gamma:>8.3f}"
            )
        lines.append(
            "These are today's weights. If the model was trained, or had other tensors put into it, this is not what it was "
            "drawn with."
        )
        return "\n".join(lines)

    def _targets_only(self) -> str:
        """Where nothing can be measured."""
        lines = [f"{'matrices':<22}{'shape':>18}{'d_in':>8}{'target std':>13}{'gamma':>8}"]
        logical, seen = self.plan.logical(), set()
        for name, (inputs, std) in targets(self.plan, self.init).items():
            one = logical[name]
            if (one.role, std) in seen:
                continue
            seen.add((one.role, std))
            shape = "x".join(map(str, one.shape))
            lines.append(f"{one.role:<22}{shape:>18}{inputs:>8}{std:>13.4e}{effective_gamma(std, inputs):>8.3f}")
        lines.append("Nothing is measured: the weights have no memory yet.")
        return "\n".join(lines)

    def check(self, max_z: float = 6.0) -> None:
        """Refuse weights that were not drawn with their target std.

        Raises:
            InitializationError: naming the worst matrix, when its std or mean is off by more than `max_z` standard errors; or
                nothing was drawn.
        """
        if not self.is_drawn:
            raise InitializationError(
                "this report is of a dry run, which drew nothing: call check() after initialize()"
            )
        check(self.matrices, max_z)

    def gathered(self, group: Any = None) -> Report:
        """The report of the whole model; a collective of torch.distributed's group, by default of all ranks.

        Parts that several ranks hold copies of count once.
        """
        import torch.distributed as dist

        mine = {
            name: (logical, self.statistics.get(name, WeightStatistics()))
            for name, logical in self.plan.logical().items()
        }
        everyone: list[dict[str, tuple[LogicalParameter, WeightStatistics]]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        logical: dict[str, LogicalParameter] = {}
        total: dict[str, WeightStatistics] = {}
        for one in everyone:
            for name, (parameter, sums) in one.items():
                logical[name] = parameter
                total[name] = total.get(name, WeightStatistics()) + sums
        for name, sums in total.items():
            if sums.count > logical[name].numel:
                total[name] = sums.times(logical[name].numel / sums.count)
        plan = self.plan.of(logical)
        return Report(plan, self.init, {n: s for n, s in total.items() if s.count}, self.is_drawn, dict(self.kept))

    def as_dict(self) -> Mapping[str, Any]:
        """As JSON takes it."""
        return as_json(self.matrices, self.roles, self.norms, self.init) | {"drawn": self.is_drawn, "kept": self.kept}

    def save(self, path: str | Path) -> None:
        """Write `as_dict` as JSON.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(json.dumps(_finite(self.as_dict()), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [self.table()]
        if self.norms and self.plan.epsilon:
            lines += saturation_lines(self.norms, self.plan.epsilon)
        else:
            lines.append("norms: what their epsilon does to a small init is not known for this model")
        lines += [f"kept: {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)
