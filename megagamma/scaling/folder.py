"""The folder of a sweep, `runs/sweeps/NAME`. The one place that knows its file names, and what they say of each point.

sweep.json      name and axes: what belongs in this folder
sweep.yaml      the sweep's file as it was last used
plan.json       its plan
choices.json    what precision.dtype and run.compile became, for all points
points/NAME/    the runs; each with point.json, what the point is, and attempts.jsonl, how often it was started
log/NAME.log    what the runs printed
table.csv, table.parquet    every validation of every point
code/           snapshots of the code that queued jobs run
slurm/          scripts and numbers of the jobs
.lock           who runs or submits the sweep now
"""

from __future__ import annotations

import copy
import functools
import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megagamma.config.io import save_config
from megagamma.config.resolve import planned_dtype
from megagamma.config.rules import data_parallel_size
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import copy_file, first_free, read_json, write_json
from megagamma.launching.attempts import AttemptLog
from megagamma.owned import require_place
from megagamma.runs.folder import RunFolder
from megagamma.runs.lock import RunLock, read_lock
from megagamma.scaling.grid import BUDGET, Sweep
from megagamma.scaling.points import Point, content_hash, data_identity, data_places

# How an attempt ended, by the run's exit code (`megagamma.cli`).
KINDS = {0: "done", 2: "refused", 3: "diverged", 75: "stopped"}
FAILURES = ("failed", "hung", "lost", "refused")
FINAL = ("done", "diverged", "behind")
"""States of a point that is not started again."""


def code_hash() -> str:
    """Content of the package's own source. Hexadecimal."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@dataclass
class PointState:
    """A point, and what has become of it."""

    point: Point
    hash: str
    folder: Path
    status: str
    """pending, running, stopped, done, diverged, behind (ended early), failed (may be tried again), given up."""
    step: int = 0
    attempts: int = 0
    failures: int = 0
    problem: str = ""
    """What the last failure was."""
    codes: tuple[str, ...] = ()
    """Hashes of the code that it ran with: several where it was resumed with another one; the last is the newest."""
    commit: str = ""
    """Commit of the checkout, with a + where files differ from it; empty outside of one."""
    seconds: float = 0.0
    """Of all attempts, start-up included."""
    training_seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def forget(self) -> None:
        """Take the point as one that was never started."""
        vars(self).update(vars(PointState(self.point, self.hash, self.folder, "pending")))

    @property
    def is_final(self) -> bool:
        """Whether it is not started again by itself."""
        return self.status in (*FINAL, "given up")


class SweepFolder:
    """The files of a sweep."""

    def __init__(self, path: str | Path) -> None:
        """Args: path: the folder; it need not be there yet."""
        self.path = Path(path)
        self.identity_file = self.path / "sweep.json"
        self.sweep_file = self.path / "sweep.yaml"
        self.points = self.path / "points"
        self.logs = self.path / "log"
        self.csv_file = self.path / "table.csv"
        self.parquet_file = self.path / "table.parquet"
        self.figure_file = self.path / "losses.png"
        self.code = self.path / "code"
        self.slurm = self.path / "slurm"
        self.choices_file = self.path / "choices.json"
        self.jobs_file = self.slurm / "jobs.jsonl"

    def lock(self) -> RunLock:
        """The lock that whoever starts points holds."""
        return RunLock(self.path, what="sweep")

    def check(self, sweep: Sweep, any_budget: bool = False) -> None:
        """Check that the folder is new, or of this sweep.

        Args:
            any_budget: take a folder of the same sweep with or without budgets, for what only reads it.

        Raises:
            ConfigurationError: it is of another sweep.
        """
        require_place(self.path, f"sweep folder {self.path}", itself=(), around=("run",))
        if not self.identity_file.exists():
            if self.path.is_dir() and any(entry.name != ".lock" for entry in self.path.iterdir()):
                raise ConfigurationError(
                    f"{self.path}: is no sweep's folder (sweep.json is missing), and not empty: choose another --state, or "
                    "another name in the sweep's file"
                )
            return
        found = read_json(self.identity_file)
        axes = sorted(axis.name for axis in sweep.grid)
        if any_budget and {*axes, BUDGET} == {*(found.get("axes") or ()), BUDGET}:
            axes = found["axes"]
        for key, ours in (("name", sweep.name), ("axes", axes)):
            if found.get(key) != ours:
                raise ConfigurationError(
                    f"{self.path}: is the folder of another sweep: its {key} {found.get(key)} differ from {ours} of "
                    f"{sweep.file}: give the sweep another name, or another --state"
                )

    def claim(self, sweep: Sweep) -> None:
        """Make the folder this sweep's; call under its lock."""
        self.check(sweep)
        self.points.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        write_json(self.identity_file, {"name": sweep.name, "axes": sorted(axis.name for axis in sweep.grid)})
        copy_file(sweep.file, self.sweep_file)

    def known(self) -> dict[str, Path]:
        """Folder of every point that was ever started, by the hash of its content, whatever the folder's name is now."""
        found = {}
        for file in sorted(self.points.glob("*/point.json")):
            if ".before-" not in file.parent.name:
                try:
                    found[str(read_json(file)["hash"])] = file.parent
                except (MegagammaError, KeyError):
                    continue  # cut off, or changed: the point is started anew beside it
        return found

    def states(self, points: list[Point], retries: int) -> list[PointState]:
        """Every point with its state; the data of the points must be prepared."""
        known = self.known()
        identities: dict[str, list[Any]] = {}
        states = []
        for point in points:
            key = data_places(point.config)
            if key not in identities:
                identities[key] = data_identity(point.config)
            digest = content_hash(point.config, identities[key])
            earlier = content_hash(point.config, identities[key], as_given=True)
            if digest not in known and earlier in known:
                digest = earlier
            folder = known.get(digest) or self.points / f"{point.name}-{digest[:8]}"
            states.append(read_state(point, digest, folder, retries))
        return states

    def register(
        self, state: PointState, code: str, commit: str | None, choices: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Write what a point is into its folder, and its config, before it is started.

        Args:
            code, commit: `code_hash` and `source_commit` of what will run it.
            choices: for `auto`, see `choose`.
        """
        state.point.config.run.folder = str(state.folder)
        # What was trained before goes on, and stays the work of the code that did it.
        before = [one for one in state.codes if one != code] if RunFolder(state.folder).steps() else []
        state.codes = (*before, code)
        write_json(
            state.folder / "point.json",
            {
                "hash": state.hash, "name": state.point.name, "seed": state.point.seed, "labels": state.point.labels,
                "values": state.point.values, "codes": state.codes, "commit": commit,
            },
        )  # fmt: skip
        # The point keeps its `auto`, by which it is recognised; what runs has what was chosen for all.
        config = copy.deepcopy(state.point.config)
        if config.precision.dtype == "auto" and "dtype" in choices:
            replicas = data_parallel_size(config, state.point.launch.processes)
            # A point added later may be one that cannot, or should not, be bf16.
            config.precision.dtype = "fp32" if planned_dtype(config, replicas, "cpu") == "fp32" else choices["dtype"]
        if config.run.compile == "auto" and "compile" in choices:
            config.run.compile = choices["compile"]
        save_config(config, state.folder / "point.yaml")

    @functools.cached_property
    def choices(self) -> dict[str, Any]:
        """What was chosen for all points, see `choose`; empty before."""
        return read_json(self.choices_file) if self.choices_file.exists() else {}

    def choose(self, choices: dict[str, str]) -> None:
        """Keep what was chosen for all points: "dtype" for precision.dtype, "compile" for run.compile."""
        write_json(self.choices_file, choices)
        vars(self).pop("choices", None)

    def set_aside(self, state: PointState) -> None:
        """Keep a point's folder under another name, so that it is run again."""
        state.folder.rename(first_free(state.folder.parent, f"{state.folder.name}.before-"))
        state.forget()


def note_start(state: PointState) -> None:
    """Record that a point is started. Each start here is a chain of its own, see `megagamma.launching.attempts`."""
    state.attempts += 1
    log = AttemptLog(RunFolder(state.folder))
    chain = f"local-{uuid.uuid4().hex[:8]}"
    log.write(
        "start",
        state.attempts,
        chain=chain,
        fingerprint=state.hash[:16],
        checkpoint=log.newest_step(),
        code=state.codes[-1],
    )


def note_end(state: PointState, kind: str, code: int, seconds: float, problem: str = "") -> None:
    """Record how an attempt ended: done, diverged, refused, stopped, behind, or failed."""
    log = AttemptLog(RunFolder(state.folder))
    values = {"kind": kind, "code": code, "seconds": seconds, "checkpoint": log.newest_step(), "problem": problem}
    log.write("end", state.attempts, **values)


def forgive(state: PointState) -> None:
    """Let a point that was given up be tried again."""
    AttemptLog(RunFolder(state.folder)).write("retry", state.attempts)


def is_running(folder: Path) -> bool:
    """Whether a process trains in a point's folder now."""
    holder = read_lock(folder)
    return holder is not None and not holder.is_stale()


def read_state(point: Point, digest: str, folder: Path, retries: int) -> PointState:
    """What a point's files say of it."""
    state = PointState(point, digest, folder, "pending")
    if not (folder / "point.json").is_file():
        return state
    record = read_json(folder / "point.json")
    state.codes = tuple(map(str, record.get("codes") or [record.get("code", "")]))  # one `code` in older folders
    state.commit = str(record.get("commit") or "")
    run = RunFolder(folder)
    state.metrics = run.metrics().read()
    state.step = int(state.metrics[-1]["step"]) if state.metrics else 0
    state.training_seconds = float(state.metrics[-1].get("seconds") or 0) if state.metrics else 0.0
    chains: dict[str, str] = {}
    chain, last = "", ""
    for line in run.attempts().read():
        event = line.get("event")
        if event == "start":
            state.attempts += 1
            # One without an end was killed together with whoever started it: no failure of the point's own.
            chain, last = str(line.get("chain")), "stopped"
        elif event == "end":
            last = str(line.get("kind", ""))
            state.seconds += float(line.get("seconds") or 0)
            if last in FAILURES:
                state.problem = str(line.get("problem") or f"exit code {line.get('code')}")
        elif event == "retry":
            chains, chain, last = {}, "", ""
        # A supervisor starts a run several times in a chain: what counts is how the chain ended.
        chains[chain] = last
    state.failures = sum(kind in FAILURES for kind in chains.values())
    if any(line.get("event") == "end" and line.get("step") == point.steps for line in run.events().read()):
        state.status = "done"
    elif is_running(folder):
        state.status = "running"
    elif last in ("diverged", "behind"):
        state.status = last
    elif last in FAILURES:
        # What was refused (config, data, machine) would be refused again.
        state.status = "given up" if state.failures > retries or last == "refused" else "failed"
    elif state.attempts:
        state.status = "stopped"
    return state
