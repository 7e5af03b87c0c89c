"""SLURM's commands, the batch scripts and their refusals, on a real SLURM and without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT
from support.slurm import Cluster, until

from megagamma.commands.fake_interrupt import main as fake_interrupt
from megagamma.errors import ConfigurationError
from megagamma.launching import slurm
from megagamma.launching.slurm import Partition, SlurmError

pytestmark = pytest.mark.xdist_group("slurm")

SCRIPT = ROOT / "launch" / "pretrain.sbatch"


@pytest.fixture
def client(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, as this process's own SLURM."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    return cluster


def sleeper(folder: Path, seconds: int = 60) -> Path:
    script = folder / "sleep.sh"
    script.write_text(f'#!/bin/bash\necho "$GREETING $1 $SLURM_JOB_NUM_NODES" > {folder}/said\nsleep {seconds}\n')
    return script


def test_jobs_are_submitted_seen_and_cancelled(client: Cluster, tmp_path: Path) -> None:
    more = ["--output=/dev/null"]
    number = slurm.submit(sleeper(tmp_path), ["--nodes=2", *more], {"GREETING": "hello"}, ["world"])
    array = slurm.submit(sleeper(tmp_path), ["--array=0-2%1", *more])
    assert client.wait(number, "RUNNING") == "RUNNING"
    found = slurm.jobs([number, array])
    assert set(found) == {number, *(f"{array}_{task}" for task in range(3))}
    assert found[number].name == slurm.job_fields(number)["JobName"]
    assert found[number].state == "RUNNING" and not found[number].has_ended
    assert found[f"{array}_2"].state == "PENDING"
    assert slurm.job_fields(number)["NumNodes"] == "2"
    slurm.cancel([number, array])
    until(lambda: all(job.has_ended for job in slurm.jobs([number, array]).values()), 30)
    assert {job.state for job in slurm.jobs([number, array]).values()} == {"CANCELLED"}
    assert (tmp_path / "said").read_text() in ("hello world 2\n", "  1\n")
    assert slurm.jobs(["999999"]) == {} and slurm.jobs([]) == {} and slurm.job_fields("999999") == {}


def test_the_partitions_are_known(client: Cluster) -> None:
    found = slurm.partitions()
    assert found == {
        "main": Partition("main", True, 4, 4, 8, 8, float("inf")),
        "urgent": Partition("urgent", False, 4, 4, 8, 8, 60.0),
    }
    assert slurm.check_request(None, 4, 8).name == "main"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--partition=foo"], "--partition=foo: this cluster has no such partition: use main or urgent"),
        (["-p", "foo"], "--partition=foo: this cluster has no such partition: use main or urgent"),
        (["--nodes=5"], "--nodes=5: partition main gives a job at most 4 nodes: ask for fewer"),
        (["-N9", "-purgent"], "--nodes=9: partition urgent gives a job at most 4 nodes: ask for fewer"),
        (["--gpus-per-node=9"], "--gpus-per-node=9: nodes of partition main have 8 GPUs: ask for fewer"),
        (["--no-such-option"], "sbatch was refused: unrecognized option '--no-such-option'"),
    ],
)
def test_refusals(client: Cluster, options: list[str], said: str) -> None:
    for ask in (slurm.check_submission, slurm.submit):
        with pytest.raises((ConfigurationError, SlurmError)) as error:
            ask(SCRIPT, options)
        assert said in str(error.value)
    assert client.call("squeue", "--noheader").strip() == "", "nothing was submitted"


def test_inside_a_job_the_login_node_is_named(client: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with pytest.raises(SlurmError, match=r"inside a job.*login node: tools/sweep.py submit"):
        slurm.submit(SCRIPT, ["--no-such-option"])
    # Where it is allowed, the sizes of the job around it are not taken for requests.
    monkeypatch.setenv("SLURM_NNODES", "9")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "99")
    slurm.cancel([slurm.submit(sleeper(tmp_path), ["--output=/dev/null"])])


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sbatch: not installed here: run this on a machine of the cluster"):
        slurm.submit(SCRIPT)
    assert slurm.job_fields("1") == {}


def test_times_of_slurm() -> None:
    minutes = [slurm.minutes_of(text) for text in ("30", "30:30", "2:00:00", "1-00:00:00", "1-12", "infinite", "n/a")]
    assert minutes == [30, 30.5, 120, 1440, 2160, float("inf"), float("inf")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["preemption"], "JOB: give the number of a SLURM job, or --folder RUN"),
        (["preemption", "999999"], "JOB=999999: is not known to SLURM: give a job that is running"),
    ],
)
def test_interrupts_that_meet_nothing(client: Cluster, words: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        fake_interrupt(words)


def test_an_interrupt_without_a_supervisor(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"no supervisor has started this run: start it with tools/supervise.py"
    ):
        fake_interrupt(["preemption", "--folder", str(tmp_path)])
    (tmp_path / "attempts.jsonl").write_text('{"event": "start", "attempt": 1, "pid": 1, "host": "elsewhere"}\n')
    with pytest.raises(ConfigurationError, match="process 1 on elsewhere, is not at work on this machine"):
        fake_interrupt(["preemption", "--folder", str(tmp_path)])


def test_a_fake_timeout_of_a_job_that_does_not_listen(
    client: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "deaf.sh"
    script.write_text(f"#!/bin/bash\ntrap '' USR1\ntouch {tmp_path}/up\nsleep 60\n")
    number = slurm.submit(script, ["--output=/dev/null"])
    client.wait(number, "RUNNING")
    assert fake_interrupt(["timeout", number, "--lead", "1"]) == 1
    said = capsys.readouterr().out
    assert f"still running after 1 s\nSIGTERM to all of job {number}" in said
    assert slurm.job_fields(number)["JobState"] != "RUNNING"


# -- the batch scripts --------------------------------------------------------------------------------------------


def script(name: str, *arguments: str, **more: str) -> tuple[int, str]:
    """Exit code and output of a batch script under plain bash, as on a laptop."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "MEGAGAMMA_PYTHON": sys.executable, **more}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / name), *arguments], cwd="/", env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_dry_run_prints_the_command() -> None:
    code, said = script(
        "pretrain.sbatch", "--config", "a b.yaml", MEGAGAMMA_DRY_RUN="1", MEGAGAMMA_TASKS_PER_NODE="4", SLURM_JOB_NUM_NODES="2",
        SLURM_CPUS_ON_NODE="32", MEGAGAMMA_CONTAINER="apptainer exec --nv image", MEGAGAMMA_SUPERVISE="--hang_minutes 5",
    )  # fmt: skip
    assert code == 0
    assert "supervise --hang_minutes 5 -- srun --nodes=2 " in said
    assert " --ntasks=8 --ntasks-per-node=4 --cpus-per-task=8 " in said
    assert f" apptainer exec --nv image {sys.executable} {ROOT}/megagamma/pretrain.py " in said
    assert r"--config a\ b.yaml" in said
    # One task per GPU; more tasks than CPUs.
    code, said = script("pretrain.sbatch", MEGAGAMMA_DRY_RUN="1", SLURM_GPUS_ON_NODE="8")
    assert " --ntasks=8 --ntasks-per-node=8 --overcommit " in said
    code, said = script("pretrain.sbatch", MEGAGAMMA_DRY_RUN="1", MEGAGAMMA_LAUNCHER="deepspeed")
    assert code == 0 and "launch/deepspeed_node.sh" in said and "--output=\\{logs\\}/node-%t.log" in said


def test_a_point_is_a_line_of_a_list(tmp_path: Path) -> None:
    points = tmp_path / "points.txt"
    points.write_text("runs/a\tconfigs/smoke.yaml\nruns/b c\tconfigs/demo.yaml\n")
    given = {"MEGAGAMMA_DRY_RUN": "1", "MEGAGAMMA_POINTS": str(points)}
    code, said = script("point.sbatch", "--run.steps", "3", SLURM_ARRAY_TASK_ID="1", **given)
    assert code == 0 and r"--config configs/demo.yaml --run.folder runs/b\ c --run.steps 3" in said
    code, said = script("point.sbatch", SLURM_ARRAY_TASK_ID="2", **given)
    assert code == 2 and f"error: {points}: has no line 2 with a folder, a tab and a config: check --array" in said
    code, said = script("point.sbatch", MEGAGAMMA_DRY_RUN="1")
    assert code == 2 and "MEGAGAMMA_POINTS=: there is no such file" in said


def test_a_script_that_cannot_start_says_why(tmp_path: Path) -> None:
    code, said = script("pretrain.sbatch", SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 2 and f"error: no launch/common.sh in {tmp_path}: submit from the checkout's folder" in said
    code, said = script("pretrain.sbatch", MEGAGAMMA_DRY_RUN="1", MEGAGAMMA_LAUNCHER="mpirun")
    assert code == 2 and "error: MEGAGAMMA_LAUNCHER=mpirun: use srun or deepspeed" in said
    code, said = script("pretrain.sbatch", MEGAGAMMA_DRY_RUN="1", MEGAGAMMA_SITE="/nowhere.sh")
    assert code == 2 and "error: MEGAGAMMA_SITE=/nowhere.sh: there is no such file" in said
    site = tmp_path / "site.sh"
    site.write_text("export MEGAGAMMA_PYTON=x\n")
    code, said = script("pretrain.sbatch", MEGAGAMMA_DRY_RUN="1", MEGAGAMMA_SITE=str(site))
    assert code == 2 and "MEGAGAMMA_PYTON is no variable of a site file: did you mean MEGAGAMMA_PYTHON?" in said
