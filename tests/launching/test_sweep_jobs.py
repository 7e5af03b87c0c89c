"""A sweep as jobs of a real SLURM: one command, multi-node points, a table at the end; given again; refused; cancelled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.slurm import ROOT, Cluster, until
from support.sweeps import table, write_study

from megagamma.commands import sweep as command
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.launching import slurm
from megagamma.runs.folder import RunFolder

pytestmark = [pytest.mark.launcher, pytest.mark.xdist_group("slurm")]

BASE = {
    "set": {"run.steps": 10, "run.threads": 1, "validation.interval": 5, "run.device": "cpu"},
    "axes": {"init.gamma": [0.5, 1.0]},
    "seeds": [1],
    "launch": {"processes": 2, "nodes": 2, "time": "10"},
}  # fmt: skip


def write(folder: Path, cache: str, **changes: Any) -> Path:
    return write_study(folder, cache, BASE, **changes)


def jobs_of(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (state / "slurm" / "jobs.jsonl").read_text().splitlines()]


@pytest.fixture
def in_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Commands of this process reach the cluster."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "MEGAGAMMA_"))]:
        monkeypatch.delenv(name)
    for name in ("SLURM_CONF", "MEGAGAMMA_PYTHON", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, cluster.env[name])
    return cluster


def ends(cluster: Cluster, state: Path, submission: str, output: Path) -> list[dict[str, Any]]:
    """Wait for the job that submits, then for the last one that it has chained."""
    assert cluster.wait(submission, seconds=120) == "COMPLETED", output.read_text()
    jobs = jobs_of(state)
    until(lambda: cluster.state(jobs[-1]["job"]) in ("COMPLETED", "FAILED"), 500, output.read_text())
    assert cluster.state(jobs[-1]["job"]) == "COMPLETED"
    return jobs


def study(
    cluster: Cluster, tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str], meanwhile: Callable[[], Any] = int
) -> list[dict[str, Any]]:
    """Submit by the one command; afterwards the table is that of the same sweep run here, and a second call does nothing."""
    state, output = tmp_path / "state", tmp_path / "submission.out"
    job = cluster.submit(
        f"--output={output}", "launch/scale_sweep.sh", str(path), "--state", str(state), "--throttle", "2"
    )
    meanwhile()
    jobs = ends(cluster, state, job, output)
    here = tmp_path / "here"
    assert command.main(["run", str(path), "--state", str(here)]) == 0
    assert table(state) == table(here)
    assert {row["status"] for row in table(state)} == {"done"} and {row["world"] for row in table(state)} == {"2"}
    capsys.readouterr()
    assert command.main(["submit", str(path), "--state", str(state)]) == 0
    assert " 0 to submit" in capsys.readouterr().out
    assert jobs_of(state) == jobs
    return jobs


def test_one_command_from_the_plan_to_the_table(
    in_cluster: Cluster,
    tmp_path: Path,
    data_cache: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And both points are preempted on the way, by an urgent job that takes all nodes: they save, are requeued, and end as
    if nothing had happened."""
    state = tmp_path / "state"

    def preempt() -> None:
        until(
            lambda: len([f for f in state.glob("points/*/metrics.jsonl") if f.read_text().count("\n") >= 3]) == 2, 120
        )
        urgent = in_cluster.submit(
            "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "true"
        )
        assert in_cluster.wait(urgent) == "COMPLETED"

    length = {"run.steps": 60, "validation.interval": 30}
    jobs = study(in_cluster, tmp_path, write(tmp_path, data_cache, set=length), capsys, preempt)
    assert [job["kind"] for job in jobs] == ["points", "collect"]
    for point in sorted((state / "points").iterdir()):
        ends = [line["kind"] for line in RunFolder(point).attempts().read() if line["event"] == "end"]
        assert ends == ["preempted", "done"]
        lines = RunFolder(point).metrics().read()
        assert [(line["first_sample"], line["samples"]) for line in lines] == [(8 * n, 8 * n + 8) for n in range(60)]
    text = (tmp_path / "submission.out").read_text()
    assert "differ in init.gamma" in text and "2 points of study, 2 nodes x 1 processes each" in text
    # What ran is the snapshot, on two nodes.
    (code,) = (state / "code").iterdir()
    for point in sorted((state / "points").iterdir()):
        provenance = json.loads((point / "provenance.json").read_text())
        assert provenance["command"][0] == f"{code}/megagamma/pretrain.py"
        assert len({rank["host"] for rank in provenance["ranks"]}) == 2
    arguments = [str(tmp_path / "study.yaml"), "--state", str(state)]
    assert command.main(["status", *arguments]) == 0
    assert "2 points: 2 done" in capsys.readouterr().out
    # Another version of the code is reported, and redone only where asked.
    monkeypatch.setattr(command, "code_hash", lambda: "another")
    assert command.main(["submit", *arguments]) == 0
    assert "2 points were trained, in whole or in part, by another version" in capsys.readouterr().out
    assert jobs_of(state) == jobs
    with pytest.raises(MegagammaError):  # what SLURM refuses loses nothing
        command.main(["submit", *arguments, "--strict_code", "--sbatch=--constraint=none"])
    assert not list(state.glob("points/*.before-1"))
    capsys.readouterr()
    assert command.main(["submit", *arguments, "--strict_code"]) == 0
    assert "2 to submit" in capsys.readouterr().out and len(list(state.glob("points/*.before-1"))) == 2
    assert command.main(["cancel", *arguments]) == 0


@pytest.mark.slow
def test_sizes_gammas_and_seeds(
    in_cluster: Cluster, tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"size": {"d32": {"model.hidden_size": 32}, "d64": {"model.hidden_size": 64}}, "init.gamma": [0.5, 1.0]}
    jobs = study(in_cluster, tmp_path, write(tmp_path, data_cache, axes=axes, seeds=[1, 2]), capsys)
    assert [(job["kind"], len(job.get("points", []))) for job in jobs] == [("points", 4), ("points", 4), ("collect", 0)]


def test_queued_points_are_left_alone_and_cancelled(
    in_cluster: Cluster, tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Points that wait in the queue are not submitted again; `cancel` ends them."""
    blocker = in_cluster.submit("--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 100")
    in_cluster.wait(blocker, "RUNNING")
    path, state = write(tmp_path, data_cache), tmp_path / "state"
    arguments = [str(path), "--state", str(state)]
    # Scoring is chained too, and is not lost when a later call does not repeat it.
    follow = ["--follow_sbatch=--time=7"]
    assert command.main(["submit", *arguments, "--evaluate", "--tasks quick", *follow]) == 0
    first = jobs_of(state)
    assert command.main(["submit", *arguments]) == 0
    assert "2 queued or running, 0 given up, 0 to submit" in capsys.readouterr().out
    assert jobs_of(state) == first
    # A longer sweep: only the new points are submitted.
    path = write(tmp_path, data_cache, seeds=[1, 2])
    assert command.main(["submit", *arguments]) == 0
    said = capsys.readouterr().out
    assert "2 queued or running, 0 given up, 2 to submit" in said
    # One table at the end, of all: the first collection would have written it without the new points.
    kinds = [(job["kind"], job["job"]) for job in jobs_of(state)]
    assert [kind for kind, _ in kinds] == ["points", "collect", "evaluate", "points", "collect", "evaluate"]
    old, collect, evaluate, new, last, scores = (number for _, number in kinds)
    assert {in_cluster.state(number) for number in (collect, evaluate)} == {"CANCELLED"}
    assert f"cancelled jobs {collect}, {evaluate}, in whose place these are" in said
    after = in_cluster.field(last, "Dependency")
    assert f"afterany:{old}_*" in after and f"afterany:{new}_*" in after and in_cluster.state(last) == "PENDING"
    assert in_cluster.field(scores, "Dependency") == f"afterany:{last}(unfulfilled)"
    assert in_cluster.field(last, "TimeLimit") == "01:00:00" and in_cluster.field(evaluate, "TimeLimit") == "00:07:00"
    # Each submission has files of its own, also within a second.
    assert len(list((state / "slurm").glob("study-*.txt"))) == 2 == len(list((state / "slurm").glob("*/study.yaml")))
    assert command.main(["status", *arguments]) == 0
    assert "4 points: 4 queued" in capsys.readouterr().out
    # A collection that is lost is chained again, though there is no point to submit.
    slurm.cancel([last])
    until(lambda: in_cluster.state(last) == "CANCELLED", 30)
    assert command.main(["submit", *arguments]) == 0
    again = jobs_of(state)[-2:]
    assert [job["kind"] for job in again] == ["collect", "evaluate"]
    after = in_cluster.field(again[0]["job"], "Dependency")
    assert f"afterany:{old}_*" in after and f"afterany:{new}_*" in after
    assert command.main(["cancel", *arguments]) == 0
    numbers = [job["job"] for job in jobs_of(state)]
    until(lambda: all(one.has_ended for one in slurm.jobs(numbers).values()), 30)
    assert command.main(["status", *arguments]) == 0
    assert "4 points: 4 pending" in capsys.readouterr().out


REFUSED = [
    ({}, ["--partition", "none"], "--partition=none: this cluster has no such partition: use main or urgent"),
    ({"launch": {"processes": 16, "nodes": 8}, "set": {"data.global_batch_size": 16}}, [], "at most 4 nodes"),
    ({"launch": {"processes": 9}, "set": {"data.global_batch_size": 9, "run.device": "auto"}}, [], "have 8 GPUs: ask"),
    ({}, ["--throttle", "-1"], "--throttle -1 must be 0"),
    ({}, ["--sbatch=-p none"], "--partition=none: this cluster has no such partition"),
    ({}, ["--partition=urgent,none"], "--partition=none: this cluster has no such partition"),
    ({"launch": {"processes": 2, "nodes": 2, "time": "2:00:00"}}, ["--sbatch", "-p urgent"],
     "points of study: launch.time=2:00:00: partition urgent gives a job at most 60 minutes"),
    ({}, ["--follow_sbatch=--gpus-per-node=9"], "--gpus-per-node=9: nodes of partition main have 8"),
    ({"set": {"parallel.memory_gib": 0.001}}, [], "point gamma0.5-seed1: "),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "more", "message"), REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_refused_before_anything_is_submitted(
    in_cluster: Cluster, tmp_path: Path, data_cache: str, changes: dict[str, Any], more: list[str], message: str
) -> None:
    path, state = write(tmp_path, data_cache, **changes), tmp_path / "state"
    with pytest.raises(ConfigurationError) as refused:
        command.main(["submit", str(path), "--state", str(state), *more])
    assert message in str(refused.value)
    assert not (state / "slurm" / "jobs.jsonl").exists()
    assert in_cluster.call("squeue", "--noheader").strip() == "", "nor is anything half submitted"


def test_a_site_file_is_used_and_checked(
    in_cluster: Cluster, tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.sh"
    monkeypatch.setenv("MEGAGAMMA_SITE", str(site))
    path, state = write(tmp_path, data_cache), tmp_path / "state"
    for text, message in (
        ("export MEGAGAMMA_PARTITON=main\n", "MEGAGAMMA_PARTITON is no variable of a site file: did you mean"),
        ("export MEGAGAMMA_CONTAINER='apptainer exec none.sif'\n", "there is no image none.sif"),
        ("export MEGAGAMMA_PARTITION=gone\n", "--partition=gone: this cluster has no such partition"),
    ):
        site.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            command.main(["submit", str(path), "--state", str(state)])
        assert not (state / "slurm").exists()


def test_variables_reach_every_rank(
    in_cluster: Cluster, tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a site keeps the environment from jobs, and its file names another number of processes."""
    site, python = tmp_path / "site.sh", tmp_path / "python.sh"
    # In place of training: says who it is, and ends as for a mistake of the user's.
    python.write_text(
        f'#!/bin/bash\necho "$MEGAGAMMA_POINTS" > {tmp_path}/rank-$SLURM_PROCID-of-$SLURM_NTASKS\nexit 2\n'
    )
    python.chmod(0o755)
    site.write_text("export MEGAGAMMA_TASKS_PER_NODE=8\n")
    for name, value in (("SITE", str(site)), ("PYTHON", str(python)), ("HOST_PYTHON", sys.executable)):
        monkeypatch.setenv(f"MEGAGAMMA_{name}", value)
    for name in ("SBATCH_EXPORT", "SLURM_EXPORT_ENV"):
        monkeypatch.setenv(name, "NONE")
    path, state = write(tmp_path, data_cache, axes={"init.gamma": [0.5]}), tmp_path / "state"
    assert command.main(["submit", str(path), "--state", str(state)]) == 0
    points, collect = jobs_of(state)
    assert in_cluster.wait(points["job"]) == "FAILED"
    assert in_cluster.wait(collect["job"]) in ("FAILED", "COMPLETED")
    said = "".join(file.read_text() for file in (state / "slurm").glob("*.out"))
    ranks = sorted(file.name for file in tmp_path.glob("rank-*-of-*") if file.name != "rank-0-of-1")
    assert ranks == ["rank-0-of-2", "rank-1-of-2"], said
    assert {(tmp_path / name).read_text().strip() for name in ranks} == {
        str(next((state / "slurm").glob("study-*.txt")))
    }


@pytest.mark.parametrize("way", [["--dry_run"], ["MEGAGAMMA_DRY_RUN"]])
def test_a_dry_run_needs_no_slurm(tmp_path: Path, data_cache: str, way: list[str]) -> None:
    """Under plain bash, with no SLURM in PATH: the plan, and every script that would be submitted."""
    words, variables = (way, {}) if way == ["--dry_run"] else ([], {way[0]: "1"})
    path, state = write(tmp_path, data_cache), tmp_path / "state"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "sed", "env"):
        found = subprocess.run(
            ["bash", "-c", f"command -v {name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        (programs / name).symlink_to(found)
    done = subprocess.run(
        ["bash", "launch/scale_sweep.sh", str(path), "--state", str(state), "--mfu", "0.3", *words, "--evaluate",
         "--tasks quick"],
        cwd=ROOT, env={"PATH": str(programs), "HOME": str(tmp_path), "MEGAGAMMA_PYTHON": sys.executable, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in (
        "gamma0.5-seed1\t", "sbatch --job-name=study --array=0-1", "--nodes=2 --ntasks-per-node=1", "launch/point.sbatch",
        "#SBATCH --requeue --signal=B:USR1@300", "sweep collect", "sweep evaluate", "-- --tasks quick",
        "speed: 30% (stated) of this machine's",
    ):  # fmt: skip
        assert text in done.stdout
    assert not state.exists()
