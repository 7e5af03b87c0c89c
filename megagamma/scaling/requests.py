"""What the jobs of a sweep ask SLURM for: groups of points, options of sbatch, variables."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagamma.errors import ConfigurationError
from megagamma.launching.sbatch_options import Option, gpus_per_node, names_gpus, parse_text, value_of
from megagamma.launching.site import Site
from megagamma.scaling.folder import PointState
from megagamma.scaling.spec import Launch, Sweep

_LARGEST_ARRAY = 1000  # tasks; SLURM's MaxArraySize is 1001 unless a site says otherwise
# Of a site's options, what holds for every job: where it may run, and who pays.
_EVERYWHERE = ("partition", "account", "qos", "reservation", "constraint", "exclude", "wckey", "comment",
               "mail-type", "mail-user", "export", "get-user-env")  # fmt: skip
_OF_THE_SWEEP = (
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "ntasks-per-gpu",
    "ntasks-per-core",
    "ntasks-per-socket",
    "array",
)
_FOLLOW_MINUTES = {"collect": 60, "evaluate": 240}


@dataclass(frozen=True)
class Group:
    """Points that one array of jobs runs: of one size, started alike."""

    name: str
    """Unique among the groups of a submission."""
    launch: Launch
    states: tuple[PointState, ...]
    needs_gpus: bool

    @property
    def tasks_per_node(self) -> int:
        """Processes of a point on each of its nodes."""
        return self.launch.processes // self.launch.nodes


def groups_of(sweep: Sweep, states: Sequence[PointState]) -> list[Group]:
    """Points by size and launch, no more than an array may have."""
    sizes = [axis.name for axis in sweep.axes if axis.is_size]
    members: dict[tuple[Any, ...], list[PointState]] = {}
    for state in states:
        point = state.point
        labels = tuple(point.labels[name] for name in sizes)
        members.setdefault((labels, point.launch, point.config.run.device == "cpu"), []).append(state)
    groups: dict[str, Group] = {}
    for (labels, launch, on_cpu), alike in members.items():
        for first in range(0, len(alike), _LARGEST_ARRAY):
            # Points of one size may be started in several ways: the name alone says which list is whose.
            base, number = "-".join((sweep.name, *labels)), 1
            name = base
            while name in groups:
                number += 1
                name = f"{base}-{number}"
            groups[name] = Group(name, launch, tuple(alike[first : first + _LARGEST_ARRAY]), not on_cpu)
    return list(groups.values())


def shared_options(args: argparse.Namespace, site: Site) -> list[Option]:
    """Options that all jobs share: the site's, then this job's own where it is one, then the command line's.

    Raises:
        ConfigurationError: a site's option that is none.
    """
    options = site.sbatch_options()
    # A job that submits hands on where it runs itself.
    for name, own, variable in (
        ("partition", "SLURM_JOB_PARTITION", "SBATCH_PARTITION"), ("account", "SLURM_JOB_ACCOUNT", "SBATCH_ACCOUNT"),
    ):  # fmt: skip
        if os.environ.get(own) and not os.environ.get(variable) and value_of(options, name) is None:
            options.append(Option(name, os.environ[own]))
    if value_of(options, "clusters") or os.environ.get("SBATCH_CLUSTERS"):
        raise ConfigurationError(
            "clusters, of MEGAGAMMA_SBATCH or SBATCH_CLUSTERS: a sweep's jobs are looked up in the cluster that they are "
            "submitted from: leave it out, and submit from the other cluster"
        )
    given = [Option(name, value) for name in ("partition", "account", "qos") if (value := getattr(args, name))]
    return _last_ones([*options, *given])


def _last_ones(options: Iterable[Option]) -> list[Option]:
    """Each option once, with its last value, at its first place."""
    return list({option.name: option for option in options}.values())


def partition_of(options: Sequence[Option]) -> str | None:
    """Partition that options name, else SBATCH_PARTITION; None: the cluster's default."""
    return value_of(options, "partition") or os.environ.get("SBATCH_PARTITION") or None


def point_extras(text: str) -> list[Option]:
    """Options of --sbatch.

    Raises:
        ConfigurationError: no options, or those that the sweep decides.
    """
    options = parse_text(text, "--sbatch")
    for option in options:
        if option.name == "clusters":
            raise ConfigurationError(
                f"--sbatch {option}: a sweep's jobs are looked up in this cluster: submit from that one"
            )
        if option.name in _OF_THE_SWEEP:
            where = "--throttle, and the number of points" if option.name == "array" else "launch of the sweep's file"
            raise ConfigurationError(f"--sbatch {option}: is decided by {where}: leave it out")
    return options


def time_limit(group: Group, args: argparse.Namespace, extras: Sequence[Option]) -> tuple[str, str]:
    """Time limit of a group's points, empty for the partition's, and the option that sets it."""
    for limit, place in ((value_of(extras, "time"), "--sbatch --time"), (args.time, "--time")):
        if limit:
            return limit, place
    return group.launch.time, "launch.time"


def point_options(
    group: Group, shared: Sequence[Option], extras: Sequence[Option], limit: str, has_gpus: bool
) -> list[Option]:
    """Options of an array of points.

    Args:
        shared: of `shared_options`.
        extras: of `point_extras`.
        limit: of `time_limit`.
        has_gpus: whether the partition's nodes have any.

    Raises:
        ConfigurationError: fewer GPUs than processes.
    """
    tasks = group.tasks_per_node
    kept = [option for option in shared if option.name not in _OF_THE_SWEEP]
    own = [Option("nodes", str(group.launch.nodes)), Option("ntasks-per-node", str(tasks))]
    if has_gpus and group.needs_gpus:
        # A site may want GPUs to be asked for in its own way, which is not mixed with another.
        named = [option for option in (*kept, *extras) if names_gpus(option) and option.name != "gpus-per-node"]
        if not named:
            own.append(Option("gpus-per-node", _with_type(kept, tasks)))
        count = gpus_per_node([*kept, *own, *extras])
        if count is not None and count < tasks:
            raise ConfigurationError(
                f"points of {group.name} have {tasks} processes on each node, one per GPU, and the options of sbatch ask for "
                f"{count} GPUs: ask for {tasks}"
            )
    if limit:
        own.append(Option("time", limit))
    return _last_ones([*kept, *own, *extras])


def _with_type(options: Sequence[Option], count: int) -> str:
    """A number of GPUs, of the type that options ask for, such as h100:4."""
    kind = (value_of(options, "gpus-per-node") or "").rpartition(":")[0]
    return f"{kind}:{count}" if kind else str(count)


def follow_options(
    kind: str, shared: Sequence[Option], text: str, partition_minutes: float, with_gpu: bool
) -> list[Option]:
    """Options of a job that follows the points: one process, an hour or four unless the user says otherwise.

    Args:
        kind: collect or evaluate.
        shared: of `shared_options`.
        text: the user's options for these jobs.
        partition_minutes: the partition's limit.
        with_gpu: whether an evaluation gets one.

    Raises:
        ConfigurationError: the text has no options.
    """
    extras = parse_text(text, "--follow_sbatch")
    kept = [option for option in shared if option.name in _EVERYWHERE]
    minutes = int(min(_FOLLOW_MINUTES[kind], max(1.0, partition_minutes)))
    own = [Option("nodes", "1"), Option("ntasks", "1"), Option("time", str(minutes))]
    if kind == "evaluate" and with_gpu and not any(names_gpus(option) for option in extras):
        own.append(Option("gpus-per-node", _with_type(shared, 1)))
    return _last_ones([*kept, *own, *extras])


def with_export(options: Sequence[Option], variables: Mapping[str, str]) -> list[Option]:
    """Options with an --export that hands the variables on, also where a site's SBATCH_EXPORT or --export keeps the rest of
    the environment from jobs."""
    said = value_of(options, "export") or os.environ.get("SBATCH_EXPORT") or "ALL"
    names = [name for name in said.split(",") if name.upper() not in ("NONE", "NIL")]
    if not any(name.upper() == "ALL" for name in names):
        names += variables
    return [*(option for option in options if option.name != "export"), Option("export", ",".join(names))]


def environment(site: Site, code: Path) -> dict[str, str]:
    """Variables of all jobs: the code's snapshot is the checkout, the Python this one where the site names none."""
    values = {"MEGAGAMMA_HOME": str(code), "MEGAGAMMA_CODE": str(code)}

    def chosen(name: str) -> str | None:
        return site.values.get(name) or os.environ.get(name)

    # Inside of a container this Python is not: there it is for the supervisor, outside.
    ours = "MEGAGAMMA_HOST_PYTHON" if chosen("MEGAGAMMA_CONTAINER") else "MEGAGAMMA_PYTHON"
    for name in ("MEGAGAMMA_PYTHON", "MEGAGAMMA_HOST_PYTHON", "MEGAGAMMA_CONTAINER"):
        value = chosen(name) or (sys.executable if name == ours else None)
        if value:
            values[name] = value
    if site.path is not None:
        values["MEGAGAMMA_SITE"] = str(site.path.absolute())
    return values
