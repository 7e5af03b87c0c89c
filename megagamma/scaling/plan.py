"""What a sweep will cost, and what of it is not a fair comparison, before anything runs."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from megagamma.errors import ConfigurationError
from megagamma.planning.flops import (
    KNOWN_DEVICES,
    known_peak_flops,
    measure_matmul_peak,
    parameter_counts,
)
from megagamma.planning.memory import check_fits
from megagamma.planning.memory import plan as plan_memory
from megagamma.reporting.log import duration
from megagamma.reporting.tables import fitted_table
from megagamma.scaling.collect import machine_warnings
from megagamma.scaling.folder import PointState
from megagamma.scaling.grid import BUDGET, Sweep
from megagamma.scaling.options import schema_option
from megagamma.scaling.points import Point, differing_options
from megagamma.scaling.rules import describe
from megagamma.scaling.tuning import learning_rate_line

# fp32 weights and two moments.
_BYTES_PER_WEIGHT = 12
_GIB = 2**30
_OPTIMAL_TOKENS = 20.0
CPU_UTILIZATION = 0.5  # assumed where nothing was measured
GPU_UTILIZATION = 0.4


@dataclass(frozen=True)
class Speed:
    """How fast a process of the sweep computes."""

    flops_per_second: float
    """Model FLOPs per second: of one process on a GPU; of all processes of a node on a CPU, whose cores they share."""
    source: str
    """Where the number comes from, in words."""
    device: str
    """cpu or cuda."""


def speed_of(states: list[PointState], device: str, mfu: float | None, is_gpu_here: bool) -> Speed:
    """The speed to plan with: of finished points where nothing is stated, else the peak times a utilization.

    Args:
        states: points, some of which may be finished.
        device: a GPU's name ("H100"), "cpu", or empty: what is here.
        mfu: stated utilization; None: measured, or an assumption.
        is_gpu_here: whether this machine has a GPU.

    Raises:
        ConfigurationError: the device is not known, or the utilization is not between 0 and 1.
    """
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigurationError(f"--mfu {mfu} must be more than 0 and at most 1")
    if device and device != "cpu":
        peak = known_peak_flops(device)
        if peak is None:
            raise ConfigurationError(f"--device {device}: its peak is not known: use cpu, {', '.join(KNOWN_DEVICES)}")
        share = mfu or GPU_UTILIZATION
        kind = "stated" if mfu else "assumed"
        return Speed(peak * share, f"{share:.0%} MFU ({kind}) of {device}'s {peak / 1e12:,.0f} TFLOP/s in bf16", "cuda")
    here = "cuda" if is_gpu_here and device != "cpu" else "cpu"
    measured = [
        line["tflops"] * 1e12 / _computers(state.point, here)
        for state in states
        for line in state.metrics[len(state.metrics) // 2 :]
        if state.status == "done" and line.get("tflops")
    ]
    here = "cuda" if is_gpu_here and device != "cpu" else "cpu"
    if here == "cuda":
        import torch  # here, since submit and status need it not

        name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
        if known_peak_flops(name) is not None and not (measured and mfu is None):
            return speed_of(states, name, mfu, is_gpu_here)
    if measured and mfu is None:
        return Speed(statistics.median(measured), "measured in the sweep's finished points", here)
    if here == "cuda":
        raise ConfigurationError("--device: name the GPU that the sweep runs on, such as H100, to plan its time")
    peak = measure_matmul_peak()
    share = mfu or CPU_UTILIZATION
    kind = "stated" if mfu else "assumed"
    return Speed(
        peak * share,
        f"{share:.0%} ({kind}) of this machine's {peak / 1e9:,.0f} GFLOP/s, measured in fp32 products",
        "cpu",
    )


def _computers(point: Point, device: str) -> int:
    """How many times the speed a point has: once per process, or once per node on CPUs."""
    return point.launch.processes if device == "cuda" else point.launch.nodes


def point_costs(point: Point, speed: Speed) -> dict[str, Any]:
    """What a point costs, as plain values, units in the names.

    Raises:
        ConfigurationError: it does not fit into `parallel.memory_gib`.
    """
    config = point.sized
    if config.run.device == "auto":
        config.run.device = "cuda" if speed.device == "cuda" else "cpu"
    try:
        check_fits(config, point.launch.processes)
    except ConfigurationError as error:
        raise ConfigurationError(f"point {point.name}: {error}") from error
    counts = parameter_counts(config.model)
    memory = plan_memory(config, point.launch.processes)
    rules = config.checkpoint
    kept = len(rules.permanent) + bool(rules.save_initial) + (point.steps.bit_length() if rules.log_spaced else 0)
    saved = point.steps // rules.interval if rules.interval else 0
    rolling = saved + bool(rules.at_end and not (rules.interval and point.steps % rules.interval == 0))
    kept += min(rolling, rules.keep_last) if rules.keep_last else rolling
    seconds = point.flops / (speed.flops_per_second * _computers(point, speed.device))
    return {
        "parameters": counts.total,
        "non_embedding": counts.non_embedding,
        "tokens": point.tokens,
        "steps": point.steps,
        "tokens_per_parameter": point.tokens / counts.total,
        "flops": point.flops,
        "processes": point.launch.processes,
        "memory_bytes_per_rank": memory.worst.device_bytes,
        "zero_stage": memory.zero_stage,
        "dtype": memory.dtype,
        "seconds": seconds,
        "device_hours": seconds * point.launch.processes / 3600,
        "disk_bytes": kept * counts.total * _BYTES_PER_WEIGHT,
    }


def comparison_lines(sweep: Sweep, points: list[Point]) -> tuple[list[str], list[str]]:
    """What the arms that are compared share and differ in, and where a rule breaks that.

    Returns:
        Lines for the plan, and warnings.
    """
    arms = [axis for axis in sweep.grid if axis.name in sweep.arms]
    named = {schema_option(option) for axis in arms for option in axis.sets}
    named |= {f"launch.{key}" for axis in arms for arm in axis.arms for key in arm.launch}
    # An axis that sets nothing gets its meaning from the rules that name it.
    bare = {axis.name for axis in arms if not axis.sets}
    named |= {option for option, rule in sweep.rules.items() if bare & set(rule.get("arms") or {})}
    differ: dict[str, tuple[str, str]] = {}
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        context = tuple(label for axis, label in point.labels.items() if axis not in sweep.arms)
        groups.setdefault((*context, point.seed), []).append(point)
    for members in groups.values():
        for other in members[1:]:
            for option in differing_options(members[0], other):
                differ.setdefault(option, (members[0].name, other.name))
    lines, warnings = [], []
    if arms and len(points) > len(groups):
        lines.append(
            f"arms {' x '.join(sweep.arms)}: differ in {', '.join(sorted(differ)) or 'nothing'}; they share seed, data order "
            "and every other option"
        )
        for option in sorted(set(differ) - named):
            warnings.append(
                f"{option} differs between arms too (a rule or a derived default gives {' and '.join(differ[option])} others): "
                "the comparison is not of the arms alone"
            )
    lines.append(learning_rate_line(sweep, points))
    lines += [describe(option, rule) for option, rule in sweep.rules.items()]
    return lines, warnings


def budget_warnings(sweep: Sweep, points: list[Point]) -> list[str]:
    """Warnings about isoFLOP grids: whether the sizes of a budget lie on both sides of where the optimum is expected.

    It is expected at 20 tokens per parameter (arXiv 2203.15556) [REF]; with fewer than two sizes on a side a parabola
    through the losses has its minimum at an edge, or nearly so.
    """
    warnings = []
    for budget in sweep.budgets:
        ratios = {}
        for point in points:
            if point.values.get(BUDGET) == budget:
                count = parameter_counts(point.sized.model).total
                ratios[count] = point.tokens / count
        smaller = sum(ratio > _OPTIMAL_TOKENS for ratio in ratios.values())
        larger = len(ratios) - smaller
        if smaller < 2 or larger < 2:
            side = "smaller" if smaller < 2 else "larger"
            warnings.append(
                f"budget {budget:g} FLOPs: {min(smaller, larger)} of {len(ratios)} sizes {side} than the expected optimum (20 "
                f"tokens per parameter), where 2 are needed: it would lie at an edge: add {side} sizes"
            )
    return warnings


def make_plan(
    sweep: Sweep, points: list[Point], states: list[PointState], speed: Speed, assumed: bool
) -> dict[str, Any]:
    """The whole plan as plain values.

    Args:
        states: of points whose data are prepared; may be empty.
        assumed: whether a vocabulary had to be assumed.

    Raises:
        ConfigurationError: a point that cannot work, by its name.
    """
    rows: dict[str, dict[str, Any]] = {}
    for point in points:
        if point.group not in rows:
            costs = point_costs(point, speed)
            rows[point.group] = {"point": point.group, "values": point.values, "lr": point.config.optimizer.lr,
                                 "by_rule": point.by_rule, "seeds": 0, "launch": asdict(point.launch), **costs}  # fmt: skip
        rows[point.group]["seeds"] += 1
    lines, warnings = comparison_lines(sweep, points)
    warnings += budget_warnings(sweep, points) + machine_warnings(states)
    if assumed:
        warnings.append(
            "the data is not there to be read: a vocabulary of 32,000 is assumed: prepare it, or set model.vocab_size"
        )
    if len(sweep.seeds) < 3:
        warnings.append(f"{len(sweep.seeds)} seeds: differences will have wide intervals: use 3 or more for a finding")
    total = {
        key: sum(row[key] * row["seeds"] for row in rows.values())
        for key in ("flops", "device_hours", "disk_bytes", "tokens")
    }
    finished = sum(state.is_final for state in states)
    return {
        "sweep": sweep.name,
        "points": len(points),
        "finished": finished,
        "speed": asdict(speed),
        "rows": list(rows.values()),
        "total": {**total, "seconds": sum(row["seconds"] * row["seeds"] for row in rows.values())},
        "comparison": lines,
        "warnings": warnings,
    }


def plan_text(values: dict[str, Any]) -> str:
    """The plan that `make_plan` gave, as text."""
    cells = [
        (
            row["point"], str(row["seeds"]), f"{row['parameters']:,}", f"{row['non_embedding']:,}", f"{row['tokens']:.3g}",
            f"{row['tokens_per_parameter']:.1f}", f"{row['flops']:.2e}", f"{row['lr']:.3g}", str(row["processes"]),
            f"{row['memory_bytes_per_rank'] / _GIB:.2f}", duration(row["seconds"]),
        )
        for row in values["rows"]
    ]  # fmt: skip
    titles = (
        "point", "seeds", "parameters", "non-emb.", "tokens", "/param", "FLOPs", "lr", "ranks", "GiB/rank", "time",
    )  # fmt: skip
    total = values["total"]
    unit = "GPU-hours" if values["speed"]["device"] == "cuda" else "process-hours"
    lines = [
        f"sweep {values['sweep']}: {values['points']} points, {values['finished']} finished",
        fitted_table(titles, cells),
        f"\nin all {total['flops']:.3g} FLOPs, {total['tokens']:.3g} tokens, {total['device_hours']:,.2f} {unit}, "
        f"{total['disk_bytes'] / _GIB:.2f} GiB of checkpoints at the end",
        f"speed: {values['speed']['source']}",
        "FLOPs count the head and attention; parameters with embedding and head, and without (non-emb.)",
        *values["comparison"],
        *(f"WARNING {line}" for line in values["warnings"]),
    ]
    return "\n".join(lines)
