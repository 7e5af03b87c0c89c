"""A sweep as SLURM jobs: an array per size, then collection, then conversion and evaluation. Given again, only what is missing.

The points run `launch/point.sbatch`, each under its supervisor (`megagamma.launching.supervisor`), from a snapshot of the
code and from the config that was written when they were submitted, so that later edits change nothing that is queued.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagamma.cli import source_tree
from megagamma.errors import ConfigurationError
from megagamma.files import JsonLines, copy_file, write_text
from megagamma.launching import slurm
from megagamma.launching.site import Site, load_site
from megagamma.launching.snapshot import snapshot
from megagamma.scaling.folder import PointState, SweepFolder
from megagamma.scaling.points import Point
from megagamma.scaling.spec import Launch, Sweep

_LARGEST_ARRAY = 1000  # tasks; SLURM's MaxArraySize is 1001 unless a site says otherwise


@dataclass(frozen=True)
class Group:
    """Points that one array of jobs runs: of one size, started alike."""

    name: str
    launch: Launch
    states: tuple[PointState, ...]
    needs_gpus: bool

    @property
    def tasks_per_node(self) -> int:
        """Processes of a point on each of its nodes."""
        return self.launch.processes // self.launch.nodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `submit`."""
    parser.add_argument(
        "--partition", help="partition (default: MEGAGAMMA_PARTITION, SBATCH_PARTITION, or the cluster's)"
    )
    parser.add_argument("--account", help="account (default: MEGAGAMMA_ACCOUNT, SBATCH_ACCOUNT)")
    parser.add_argument("--qos", help="quality of service (default: MEGAGAMMA_QOS)")
    parser.add_argument("--time", help="time limit of a point, as sbatch takes it (default: launch.time of the sweep)")
    parser.add_argument(
        "--throttle", type=int, default=0, metavar="N", help="points of a size at a time (default: all)"
    )
    parser.add_argument("--sbatch", default="", metavar="OPTIONS", help="further options of sbatch for the points")
    parser.add_argument(
        "--evaluate", nargs="?", const="", metavar="OPTIONS",
        help="afterwards convert and score the finished points, with these options of convert_and_eval",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print what would be submitted, and submit nothing")


def groups_of(sweep: Sweep, states: Sequence[PointState]) -> list[Group]:
    """Points by size and launch, no more than an array may have."""
    sizes = [axis.name for axis in sweep.axes if axis.is_size]
    found: dict[tuple[Any, ...], list[PointState]] = {}
    for state in states:
        point = state.point
        labels = tuple(point.labels[name] for name in sizes)
        found.setdefault((labels, point.launch, point.config.run.device == "cpu"), []).append(state)
    groups = []
    for (labels, launch, on_cpu), members in found.items():
        for first in range(0, len(members), _LARGEST_ARRAY):
            name = "-".join((sweep.name, *labels)) + (f"-{first // _LARGEST_ARRAY + 1}" if first else "")
            groups.append(Group(name, launch, tuple(members[first : first + _LARGEST_ARRAY]), not on_cpu))
    return groups


def _options(args: argparse.Namespace, site: Site) -> list[str]:
    """Options of sbatch that all jobs have: the site's, then this job's own where it is one, then the command line's."""
    options = site.sbatch_options()
    # A job that submits hands on where it runs itself.
    for option, own, variable in (
        ("partition", "SLURM_JOB_PARTITION", "SBATCH_PARTITION"), ("account", "SLURM_JOB_ACCOUNT", "SBATCH_ACCOUNT"),
    ):  # fmt: skip
        named = any(word.startswith(f"--{option}=") for word in options)
        if os.environ.get(own) and not os.environ.get(variable) and not named:
            options.append(f"--{option}={os.environ[own]}")
    options += [f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(args, name))]
    return options


def _partition(options: Sequence[str]) -> str | None:
    named = [word.partition("=")[2] for word in options if word.startswith("--partition=")]
    return named[-1] if named else os.environ.get("SBATCH_PARTITION") or None


def _point_options(group: Group, args: argparse.Namespace, has_gpus: bool) -> list[str]:
    launch, tasks = group.launch, group.tasks_per_node
    options = [f"--nodes={launch.nodes}", f"--ntasks-per-node={tasks}"]
    if has_gpus and group.needs_gpus:
        options.append(f"--gpus-per-node={tasks}")
    limit = args.time or launch.time
    return options + ([f"--time={limit}"] if limit else []) + shlex.split(args.sbatch)


def _environment(site: Site, code: Path) -> dict[str, str]:
    """Variables of all jobs: the code's snapshot is the checkout, the Python this one where the site names none."""
    found = {"MEGAGAMMA_HOME": str(code), "MEGAGAMMA_CODE": str(code)}
    if not site.values.get("MEGAGAMMA_PYTHON"):
        found["MEGAGAMMA_PYTHON"] = os.environ.get("MEGAGAMMA_PYTHON") or sys.executable
    if site.path is not None:
        found["MEGAGAMMA_SITE"] = str(site.path.absolute())
    return found


def queued(folder: SweepFolder) -> dict[str, str]:
    """State of the job of every point that SLURM has not ended, by the point's hash; empty without SLURM."""
    lines = [line for line in JsonLines(folder.jobs_file).read() if line.get("kind") == "points"]
    if not lines:
        return {}
    known = slurm.jobs(str(line["job"]) for line in lines)
    found = {}
    for line in lines:
        for place, digest in enumerate(line["points"]):
            state = known.get(f"{line['job']}_{place}")
            if state is not None and not state.has_ended:
                found[str(digest)] = state.state
    return found


def mark_queued(folder: SweepFolder, states: Sequence[PointState]) -> None:
    """Give points that wait in SLURM's queue the state `queued`. A command that is only asked for the state needs no SLURM."""
    try:
        waiting = queued(folder)
    except slurm.SlurmError:
        return
    for state in states:
        if not state.is_final and state.status != "running" and state.hash in waiting:
            state.status = "running" if waiting[state.hash] == "RUNNING" else "queued"


def cancel_jobs(folder: SweepFolder) -> list[str]:
    """Cancel the sweep's jobs that have not ended; returns their numbers. Running points save first."""
    lines = JsonLines(folder.jobs_file).read()
    if not lines:
        return []
    numbers = [str(line["job"]) for line in lines]
    known = slurm.jobs(numbers)
    alive = [n for n in numbers if any(i.partition("_")[0] == n and not s.has_ended for i, s in known.items())]
    if alive:
        # First what would begin because the others have ended.
        slurm.cancel(reversed(alive))
    return alive


class Submission:
    """The jobs of one call of `submit`."""

    def __init__(self, args: argparse.Namespace, sweep: Sweep, folder: SweepFolder, site: Site) -> None:
        self.args, self.sweep, self.folder, self.site = args, sweep, folder, site
        self.options = _options(args, site)
        self.stamp = time.strftime("%Y%m%d-%H%M%S")
        self.has_gpus = False

    def check(self, groups: Sequence[Group]) -> None:
        """Check every request against the cluster, before anything is prepared or submitted.

        Raises:
            ConfigurationError, SlurmError: no such partition, too few nodes or GPUs, no SLURM.
        """
        for group in groups:
            try:
                found = slurm.check_request(_partition(self.options), group.launch.nodes)
                self.has_gpus = found.gpus > 0
                if self.has_gpus and group.needs_gpus:
                    slurm.check_request(_partition(self.options), group.launch.nodes, group.tasks_per_node)
            except ConfigurationError as error:
                raise ConfigurationError(f"{self.sweep.file}: points of {group.name}: {error}") from error

    def words(self, group: Group, place: Path) -> tuple[list[str], dict[str, str]]:
        """Options of sbatch and variables of an array."""
        last = len(group.states) - 1
        throttle = f"%{self.args.throttle}" if self.args.throttle else ""
        options = [
            f"--job-name={group.name}", f"--array=0-{last}{throttle}", f"--output={place.parent.absolute()}/%x-%A_%a.out",
            f"--chdir={Path.cwd()}", *self.options, *_point_options(group, self.args, self.has_gpus),
        ]  # fmt: skip
        variables = {
            "MEGAGAMMA_POINTS": str(place.absolute()), "MEGAGAMMA_TASKS_PER_NODE": str(group.tasks_per_node),
        }  # fmt: skip
        return options, variables

    def list_text(self, group: Group) -> str:
        """The list of an array's points, as launch/point.sbatch reads it."""
        return "".join(f"{s.folder.absolute()}\t{(s.folder / 'point.yaml').absolute()}\n" for s in group.states)

    def follow_words(self, name: str, after: Sequence[str], place: Path) -> list[str]:
        """Options of sbatch of a job that follows."""
        kept = [word for word in self.options if not re.match(r"--(signal|gpus|nodes|ntasks|exclusive)", word)]
        return [
            f"--job-name={self.sweep.name}-{name}", f"--dependency=afterany:{':'.join(after)}", "--nodes=1", "--ntasks=1",
            f"--output={place.absolute()}/%x-%j.out", f"--chdir={Path.cwd()}", *kept,
        ]  # fmt: skip

    def follow_arguments(self, code: Path) -> dict[str, list[str]]:
        """Commands that follow the points, by name."""
        frozen = self.folder.slurm / f"{self.stamp}.yaml"
        common = [str(frozen.absolute()), "--state", str(self.folder.path.absolute()), "--tree", str(code)]
        if self.sweep.budgets:
            common += ["--budget", *(repr(budget) for budget in self.sweep.budgets)]
        commands = {"collect": ["sweep", "collect", *common]}
        if self.args.evaluate is not None:
            commands["evaluate"] = ["sweep", "evaluate", *common, "--", *shlex.split(self.args.evaluate)]
        return commands

    def dry_run(self, groups: Sequence[Group], root: Path, say: Callable[[str], None]) -> None:
        """Print every script and how it would be submitted."""
        place, code = self.folder.slurm, self.folder.code / "code-HASH"
        for group in groups:
            file = place / f"{group.name}-{self.stamp}.txt"
            options, variables = self.words(group, file)
            given = {**_environment(self.site, code), **variables}
            say(f"# {file}\n{self.list_text(group)}")
            say(" ".join(f"{k}={shlex.quote(v)}" for k, v in given.items()) + " \\")
            say(f"  sbatch {shlex.join(options)} launch/point.sbatch\n")
        for name, words in self.follow_arguments(code).items():
            options = self.follow_words(name, ["JOBS"], place)
            say(f"sbatch {shlex.join(options)} launch/follow.sbatch {shlex.join(words)}\n")
        for script in ("point.sbatch", "follow.sbatch", "common.sh"):
            say(f"# launch/{script}\n{(root / 'launch' / script).read_text(encoding='utf-8')}")

    def submit(self, groups: Sequence[Group], code: Path, say: Callable[[str], None]) -> None:
        """Submit the arrays and what follows them."""
        log, place = JsonLines(self.folder.jobs_file), self.folder.slurm
        copy_file(self.sweep.file, place / f"{self.stamp}.yaml")
        requests = []
        for group in groups:
            file = place / f"{group.name}-{self.stamp}.txt"
            write_text(file, self.list_text(group))
            options, variables = self.words(group, file)
            request = (options, {**_environment(self.site, code), **variables})
            slurm.check_submission(code / "launch" / "point.sbatch", *request)
            requests.append((group, request))
        numbers = []
        for group, (options, variables) in requests:
            number = slurm.submit(code / "launch" / "point.sbatch", options, variables)
            # At once, so that a kill here does not lead to a second array of the same points.
            points = [state.hash for state in group.states]
            log.write({"kind": "points", "job": number, "group": group.name, "points": points, "time": time.time()})
            numbers.append(number)
            say(f"job {number}: {len(points)} points of {group.name}, {_shape(group)}")
        for name, words in self.follow_arguments(code).items():
            options = self.follow_words(name, numbers, place)
            number = slurm.submit(
                code / "launch" / "follow.sbatch", options, _environment(self.site, code), arguments=words
            )
            log.write({"kind": name, "job": number, "time": time.time()})
            say(f"job {number}: {name}, when the points have ended")
            numbers = [number]
        log.close()


def _shape(group: Group) -> str:
    return f"{group.launch.nodes} nodes x {group.tasks_per_node} processes each"


def freeze(point: Point, code: Path) -> None:
    """Let a point read its DeepSpeed file from the snapshot, where it lies in it."""
    frozen = code / point.config.deepspeed_config
    if point.config.deepspeed_config != "auto" and frozen.is_file():
        point.config.deepspeed_config = str(frozen.absolute())


def submit_sweep(
    args: argparse.Namespace,
    sweep: Sweep,
    folder: SweepFolder,
    points: list[Point],
    prepared_states: Callable[[], list[PointState]],
    register: Callable[[list[PointState], Path], None],
    say: Callable[[str], None],
) -> int:
    """Submit what is neither finished, nor queued, nor given up.

    Args:
        args: of `add_arguments`.
        points: all points of the sweep.
        prepared_states: prepares the data, and returns the points' states.
        register: writes what is going to run into the points' folders; gets the states and the code's snapshot.
        say: prints a line.

    Raises:
        ConfigurationError, SlurmError: before anything is submitted.
    """
    if args.throttle < 0:
        raise ConfigurationError(f"--throttle {args.throttle} must be 0 (all) or more")
    site, root = load_site(), source_tree()
    submission = Submission(args, sweep, folder, site)
    everything = [PointState(point, "", folder.points / point.name, "pending") for point in points]
    if args.dry_run:
        submission.dry_run(groups_of(sweep, everything), root, say)
        return 0
    submission.check(groups_of(sweep, everything))
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock():
        folder.claim(sweep)
        folder.slurm.mkdir(exist_ok=True)
        states = prepared_states()
        waiting = queued(folder)
        todo = [s for s in states if not s.is_final and s.status != "running" and s.hash not in waiting]
        given_up = sum(state.status == "given up" for state in states)
        finished = sum(state.is_final for state in states) - given_up
        say(
            f"sweep {sweep.name} in {folder.path}: {len(states)} points, {finished} finished, "
            f"{len(waiting)} queued or running, {given_up} given up, {len(todo)} to submit"
        )
        if not todo:
            return 1 if given_up else 0
        code = snapshot(root, folder.code).absolute()
        register(todo, code)
        submission.submit(groups_of(sweep, todo), code, say)
    return 0
