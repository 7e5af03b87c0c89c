"""A sweep as SLURM jobs: an array per size, then collection, then conversion and evaluation. Given again, only what is missing.

The points run `launch/point.sbatch`, each under its supervisor (`megagamma.launching.supervisor`), from a snapshot of the
code and from the config that was written when they were submitted, so that later edits change nothing that is queued.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megagamma.cli import source_tree
from megagamma.errors import ConfigurationError
from megagamma.files import JsonLines, copy_file, write_text
from megagamma.launching import slurm
from megagamma.launching.sbatch_options import Option, parse_text
from megagamma.launching.site import Site, load_site
from megagamma.launching.snapshot import snapshot
from megagamma.scaling import requests
from megagamma.scaling.folder import PointState, SweepFolder
from megagamma.scaling.points import Point
from megagamma.scaling.requests import Group, groups_of
from megagamma.scaling.spec import Sweep


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
    parser.add_argument(
        "--sbatch",
        default="",
        metavar="OPTIONS",
        help="options of sbatch for the points: --sbatch='--mem=0'",
    )
    parser.add_argument(
        "--follow_sbatch", metavar="OPTIONS",
        help="options of sbatch for collection and evaluation (default: MEGAGAMMA_FOLLOW_SBATCH; an hour, and four hours and "
        "a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--evaluate", nargs="?", const="", metavar="OPTIONS",
        help="afterwards convert and score the finished points, with these options of convert_and_eval",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print the plan first, as the action plan does")
    parser.add_argument("--dry_run", action="store_true", help="print what would be submitted, and submit nothing")


# -- jobs that were submitted ------------------------------------------------------------------------------------


def _alive(folder: SweepFolder) -> list[tuple[dict[str, Any], dict[int, slurm.JobState]]]:
    """Lines of jobs.jsonl whose jobs SLURM has not ended, with their tasks; a job that is no array is its task 0."""
    lines = JsonLines(folder.jobs_file).read()
    if not lines:
        return []
    tasks: dict[str, dict[int, slurm.JobState]] = {}
    for name, state in slurm.jobs(str(line["job"]) for line in lines).items():
        number, _, place = name.partition("_")
        if not state.has_ended and (place or "0").isdigit():
            tasks.setdefault(number, {})[int(place or 0)] = state
    found = [(line, tasks[str(line["job"])]) for line in lines if str(line["job"]) in tasks]
    return [(line, own) for line, own in found if _is_ours(line, own.values())]


def _is_ours(line: dict[str, Any], tasks: Iterable[slurm.JobState]) -> bool:
    """Whether a job is the one that was submitted: numbers begin anew where a controller is set up again."""
    return all(task.name == line.get("name", task.name) for task in tasks)


def queued(folder: SweepFolder) -> dict[str, str]:
    """State of the job of every point that SLURM has not ended, by the point's hash; empty without SLURM."""
    return {
        str(line["points"][place]): state.state
        for line, tasks in _alive(folder)
        if line["kind"] == "points"
        for place, state in tasks.items()
        if place < len(line["points"])
    }


def mark_queued(folder: SweepFolder, states: Sequence[PointState]) -> None:
    """Give points that wait in SLURM's queue the state `queued`. A command that is only asked for the state needs no SLURM."""
    try:
        waiting = queued(folder)
    except slurm.SlurmError:
        return
    for state in states:
        if not state.is_final and state.status != "running" and state.hash in waiting:
            state.status = "queued"  # also a job that runs already, and does not train yet


def cancel_jobs(folder: SweepFolder) -> list[str]:
    """Cancel the sweep's jobs that have not ended; returns their numbers. Running points save first."""
    alive = [str(line["job"]) for line, _ in _alive(folder)]
    if alive:
        # First what would begin because the others have ended.
        slurm.cancel(reversed(alive))
    return alive


# -- jobs that are submitted now ---------------------------------------------------------------------------------


class Submission:
    """The jobs of one call of `submit`."""

    def __init__(self, args: argparse.Namespace, sweep: Sweep, folder: SweepFolder, site: Site) -> None:
        """Raises: ConfigurationError: options of sbatch that are none, or that the sweep decides."""
        self.args, self.sweep, self.folder, self.site = args, sweep, folder, site
        self.shared = requests.shared_options(args, site)
        self.extras = requests.point_extras(args.sbatch)
        self.follow = args.follow_sbatch
        if self.follow is None:
            self.follow = site.values.get("MEGAGAMMA_FOLLOW_SBATCH", "")
        self.evaluate: str | None = args.evaluate
        try:
            shlex.split(self.evaluate or "")
        except ValueError as error:
            raise ConfigurationError(f"--evaluate {self.evaluate}: {error}: close the quotation") from error
        self.stamp = time.strftime("%Y%m%d-%H%M%S")
        self.partitions: dict[str, slurm.Partition] = {}
        self.jobs: list[dict[str, Any]] = []

    def check(self, groups: Sequence[Group]) -> None:
        """Check every request against the cluster, before anything is prepared or submitted.

        Raises:
            ConfigurationError, SlurmError: no such partition, too few nodes or GPUs, too short a time, no SLURM.
        """
        partition = requests.partition_of([*self.shared, *self.extras])
        for group in groups:
            limit = requests.time_limit(group, self.args, self.extras)
            try:
                chosen = slurm.check_request(partition, group.launch.nodes, 0, *limit)
                if chosen.gpus and group.needs_gpus:
                    chosen = slurm.check_request(partition, group.launch.nodes, group.tasks_per_node, *limit)
            except ConfigurationError as error:
                raise ConfigurationError(f"{self.sweep.file}: points of {group.name}: {error}") from error
            self.partitions[group.name] = chosen
            self._request(group, self.folder.slurm / "points.txt", self.folder.code)

    @property
    def on_gpus(self) -> bool:
        """Whether any points get GPUs; after `check`."""
        return any(partition.gpus for partition in self.partitions.values())

    def _request(self, group: Group, place: Path, code: Path) -> tuple[list[str], dict[str, str]]:
        """Words of sbatch and variables of an array."""
        throttle = f"%{self.args.throttle}" if self.args.throttle else ""
        limit, _ = requests.time_limit(group, self.args, self.extras)
        partition = self.partitions.get(group.name)
        options = [
            Option("job-name", group.name), Option("array", f"0-{len(group.states) - 1}{throttle}"),
            Option("output", f"{place.parent.absolute()}/%x-%A_%a.out"), Option("chdir", str(Path.cwd())),
            *requests.point_options(group, self.shared, self.extras, limit, partition is not None and partition.gpus > 0),
        ]  # fmt: skip
        variables = {
            **requests.environment(self.site, code), "MEGAGAMMA_POINTS": str(place.absolute()),
            # Not MEGAGAMMA_TASKS_PER_NODE, which the site file may set: that is for jobs that do not say.
            "MEGAGAMMA_POINT_TASKS": str(group.tasks_per_node), "MEGAGAMMA_POINT_NODES": str(group.launch.nodes),
        }  # fmt: skip
        return [str(option) for option in requests.with_export(options, variables)], variables

    def _follow_request(
        self, kind: str, code: Path, after: Sequence[str], needs_gpus: bool
    ) -> tuple[list[str], dict[str, str]]:
        """Words of sbatch and variables of a job that follows; without a dependency where there is no job yet."""
        partition = None
        if self.partitions:
            chosen = requests.partition_of([*self.shared, *parse_text(self.follow, "--follow_sbatch")])
            partition = slurm.check_request(chosen, 1)
        variables = requests.environment(self.site, code)
        options = [
            Option("job-name", f"{self.sweep.name}-{kind}"),
            *([Option("dependency", f"afterany:{':'.join(after)}")] if after else []),
            Option("output", f"{self.folder.slurm.absolute()}/%x-%j.out"), Option("chdir", str(Path.cwd())),
            *requests.follow_options(
                kind, self.shared, self.follow, partition.minutes if partition else float("inf"),
                needs_gpus and partition is not None and partition.gpus > 0,
            ),
        ]  # fmt: skip
        return [str(option) for option in requests.with_export(options, variables)], variables

    @property
    def _frozen(self) -> Path:
        """The sweep's file as it was submitted, under its own name, which may be the sweep's."""
        return self.folder.slurm / self.stamp / self.sweep.file.name

    def list_text(self, group: Group) -> str:
        """The list of an array's points, as launch/point.sbatch reads it."""
        return "".join(f"{s.folder.absolute()}\t{(s.folder / 'point.yaml').absolute()}\n" for s in group.states)

    def follow_arguments(self, code: Path) -> dict[str, list[str]]:
        """Commands that follow the points, by name."""
        common = [str(self._frozen.absolute()), "--state", str(self.folder.path.absolute()), "--tree", str(code)]
        if self.sweep.budgets:
            common += ["--budget", *(repr(budget) for budget in self.sweep.budgets)]
        commands = {"collect": ["sweep", "collect", *common]}
        if self.evaluate is not None:
            commands["evaluate"] = ["sweep", "evaluate", *common, "--", *shlex.split(self.evaluate)]
        return commands

    def dry_run(self, groups: Sequence[Group], root: Path, say: Callable[[str], None]) -> None:
        """Print every script and how it would be submitted."""
        place, code = self.folder.slurm, self.folder.code / "code-HASH"
        for group in groups:
            file = place / f"{group.name}-{self.stamp}.txt"
            options, variables = self._request(group, file, code)
            say(f"# {file}\n{self.list_text(group)}")
            say(f"{_assignments(variables)} \\\n  sbatch {shlex.join(options)} launch/point.sbatch\n")
            self.jobs.append({"kind": "points", "name": group.name, "options": options, "variables": variables})
        for kind, words in self.follow_arguments(code).items():
            options, variables = self._follow_request(kind, code, ["JOBS"], any(group.needs_gpus for group in groups))
            say(
                f"{_assignments(variables)} \\\n  sbatch {shlex.join(options)} launch/follow.sbatch {shlex.join(words)}\n"
            )
            self.jobs.append({"kind": kind, "options": options, "variables": variables, "arguments": words})
        for script in ("point.sbatch", "follow.sbatch", "common.sh"):
            say(f"# launch/{script}\n{(root / 'launch' / script).read_text(encoding='utf-8')}")

    def submit(
        self,
        groups: Sequence[Group],
        code: Path,
        before: Callable[[], None],
        with_gpus: bool,
        say: Callable[[str], None],
    ) -> None:
        """Submit the arrays, none where all points are queued or finished, and what follows them; call under the sweep's lock.

        Args:
            before: called when SLURM would take all jobs, before the first is submitted.
            with_gpus: whether any point of the sweep wants GPUs.

        What follows waits for all points that are alive, also of earlier submissions, and takes the place of what those
        have chained: an older one would write an older table.
        """
        place, earlier = self.folder.slurm, _alive(self.folder)
        for line, _ in earlier:
            if line["kind"] == "evaluate" and self.evaluate is None:
                self.evaluate = str(line.get("options", ""))
                say(f"evaluation with {self.evaluate or 'no options'}, as job {line['job']} would have done it")
        self._choose_stamp()
        self._frozen.parent.mkdir()
        copy_file(self.sweep.file, self._frozen)
        arrays = []
        for group in groups:
            file = place / f"{group.name}-{self.stamp}.txt"
            write_text(file, self.list_text(group))
            arrays.append((group, *self._request(group, file, code)))
            slurm.check_submission(code / "launch" / "point.sbatch", *arrays[-1][1:])
        commands = self.follow_arguments(code)
        # Before the first submission, so that nothing is half submitted.
        for kind, words in commands.items():
            slurm.check_submission(
                code / "launch" / "follow.sbatch", *self._follow_request(kind, code, [], with_gpus), words
            )
        before()
        with contextlib.closing(JsonLines(self.folder.jobs_file)) as log:
            numbers = []
            for group, options, variables in arrays:
                number = slurm.submit(code / "launch" / "point.sbatch", options, variables)
                # At once, so that a kill here does not lead to a second array of the same points.
                points = [state.hash for state in group.states]
                self._note(log, {"kind": "points", "job": number, "name": group.name, "points": points})
                numbers.append(number)
                say(f"job {number}: {len(points)} points of {group.name}, {_shape(group)}")
            numbers += [str(line["job"]) for line, _ in earlier]
            for kind, words in commands.items():
                options, variables = self._follow_request(kind, code, numbers, with_gpus)
                number = slurm.submit(code / "launch" / "follow.sbatch", options, variables, words)
                note = {"kind": kind, "job": number, "name": f"{self.sweep.name}-{kind}"}
                self._note(log, note if kind == "collect" else {**note, "options": self.evaluate})
                say(f"job {number}: {kind}, when the points have ended")
                numbers = [number]
        replaced = [
            str(line["job"])
            for line, tasks in earlier
            if line["kind"] != "points" and all(task.state == "PENDING" for task in tasks.values())
        ]
        if replaced:
            slurm.cancel(reversed(replaced))
            say(f"cancelled jobs {', '.join(replaced)}, in whose place these are")

    def _choose_stamp(self) -> None:
        """A name of this submission's files that none has; two may be made in one second."""
        first, number = self.stamp, 1
        while self._frozen.parent.exists():
            number += 1
            self.stamp = f"{first}-{number}"

    def _note(self, log: JsonLines, values: dict[str, Any]) -> None:
        log.write({**values, "time": time.time()})
        self.jobs.append(values)


def _assignments(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


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
    check_points: Callable[[bool], None],
    prepared_states: Callable[[], list[PointState]],
    register: Callable[[list[PointState], Path], None],
    say: Callable[[str], None],
) -> tuple[int, dict[str, Any]]:
    """Submit what is neither finished, nor queued, nor given up.

    Args:
        args: of `add_arguments`.
        points: all points of the sweep.
        check_points: refuses points that cannot work; gets whether they run on GPUs.
        prepared_states: prepares the data, and returns the points' states.
        register: writes what is going to run into the points' folders, once SLURM would take it; gets the states and the
            code's snapshot.
        say: prints a line.

    Raises:
        ConfigurationError, SlurmError: before anything is submitted.

    Returns:
        The exit code, and plain values: the jobs, and every point with its state.
    """
    if args.throttle < 0:
        raise ConfigurationError(f"--throttle {args.throttle} must be 0 (all) or more")
    site, root = load_site(), source_tree()
    submission = Submission(args, sweep, folder, site)
    if sweep.stop_lost is not None:
        say(
            "WARNING stop_lost: points that are jobs do not watch each other, so none is ended early; sweep run does it"
        )
    everything = [PointState(point, "", folder.points / point.name, "pending") for point in points]
    if args.dry_run:
        check_points(bool(args.device) and args.device != "cpu")
        submission.dry_run(groups_of(sweep, everything), root, say)
        return 0, {"jobs": submission.jobs, "points": _rows(everything)}
    submission.check(groups_of(sweep, everything))
    check_points(submission.on_gpus)
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
        kinds = {line["kind"] for line, _ in _alive(folder)}
        lacks_collect = "points" in kinds and "collect" not in kinds
        if todo or lacks_collect or (args.evaluate is not None and "evaluate" not in kinds):
            code = snapshot(root, folder.code).absolute()
            with_gpus = any(point.config.run.device != "cpu" for point in points)
            submission.submit(groups_of(sweep, todo), code, lambda: register(todo, code), with_gpus, say)
            waiting |= {state.hash: "PENDING" for state in todo}
        for state in states:
            if not state.is_final and state.status != "running" and state.hash in waiting:
                state.status = "queued"
    return 1 if given_up and not todo else 0, {"jobs": submission.jobs, "points": _rows(states)}


def _rows(states: Sequence[PointState]) -> list[dict[str, str]]:
    return [
        {"point": state.point.name, "hash": state.hash, "status": state.status, "folder": str(state.folder)}
        for state in states
    ]
