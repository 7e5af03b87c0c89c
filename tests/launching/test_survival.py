"""Whatever happens to a job, its run ends as if nothing had: real training under a real SLURM, on several nodes.

Each test ends with the losses of the uninterrupted run, to the bit, and every sample used once and in order.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.processes import attempt, losses, metrics
from support.ranks import RankPool
from support.slurm import ROOT, Cluster, until

from megagamma.commands.fake_interrupt import main as fake_interrupt
from megagamma.launching.stacks import read_stacks
from megagamma.runs.folder import RunFolder

pytestmark = [pytest.mark.launcher, pytest.mark.xdist_group("slurm")]

STEPS, BATCH, EVERY = 100, 8, 20


def options(folder: Path, data_cache: str, *more: str) -> list[str]:
    return [
        *("--run.folder", str(folder), "--data.cache", data_cache, "--run.steps", str(STEPS), "--run.threads", "1"),
        *("--validation.interval", "0", "--validation.at_end", "false", "--logging.sample_tokens", "0"),
        *("--checkpoint.interval", str(EVERY), *more),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, two_ranks: RankPool, data_cache: str) -> list[float]:
    """Losses of the uninterrupted run, on two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert two_ranks.run(attempt, options(folder, data_cache), True) == [("", 0, "")] * 2
    found = losses(folder)
    assert len(found) == STEPS and found[0] - found[-1] > 1
    # Negative control: steps differ, so that one that is repeated or left out would be seen.
    assert len(set(found)) == STEPS
    return found


class Job:
    """A run of two ranks on two nodes, as a user submits it."""

    def __init__(self, cluster: Cluster, place: Path, data_cache: str, *more: str) -> None:
        self.cluster, self.place, self.folder = cluster, place, RunFolder(place / "run")
        self.options = ["--config", str(ROOT / "configs" / "smoke.yaml"), *options(self.folder.path, data_cache, *more)]

    def submit(self, *sbatch: str, faults: dict[str, Any] | None = None, **more: str) -> str:
        self.output = self.place / "job.out"
        environment = {"MEGAGAMMA_TASKS_PER_NODE": "1", **more}
        if faults is not None:
            environment |= {
                "MEGAGAMMA_FAULTS": json.dumps(faults),
                "REAL_PYTHON": self.cluster.env["MEGAGAMMA_PYTHON"],
                "MEGAGAMMA_PYTHON": str(ROOT / "tests" / "support" / "faulty_python.sh"),
            }
        self.number = self.cluster.submit(
            "--nodes=2", "--exclusive", f"--output={self.output}", *sbatch, "launch/pretrain.sbatch", *self.options,
            **environment,
        )  # fmt: skip
        return self.number

    def steps(self) -> int:
        return len(metrics(self.folder.path))

    def train_until(self, step: int) -> None:
        until(
            lambda: self.steps() >= step or self.cluster.state(self.number) in ("FAILED", "COMPLETED"), 100, self.said()
        )
        assert self.steps() < STEPS, "interrupted on the way"

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def ends(self, state: str = "COMPLETED") -> None:
        assert self.cluster.wait(self.number) == state, self.said()

    def kinds(self) -> list[str]:
        return [line["kind"] for line in self.folder.attempts().read() if line["event"] == "end"]

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.folder.attempts().read() if line["event"] == event]

    def equals(self, whole: list[float]) -> None:
        """The same losses to the bit, and no sample left out or repeated."""
        found = metrics(self.folder.path)
        assert losses(self.folder.path) == whole
        assert [(line["first_sample"], line["samples"]) for line in found] == [
            (step * BATCH, (step + 1) * BATCH) for step in range(STEPS)
        ]


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path, data_cache: str) -> Job:
    return Job(cluster, tmp_path, data_cache)


@pytest.mark.slow
def test_a_preempted_job_resumes(job: Job, cluster: Cluster, tmp_path: Path, whole: list[float]) -> None:
    """An urgent job takes all nodes: the run saves within the grace time, is requeued, and ends equal to the bit."""
    config = tmp_path / "mine.yaml"
    shutil.copy(ROOT / "configs" / "smoke.yaml", config)
    job.options[1] = str(config)
    job.submit()
    job.train_until(3)
    # An edit after the job has started is none of its.
    config.write_text(config.read_text().replace("lr: 0.003", "lr: 0.001"))
    urgent = cluster.submit("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    assert cluster.wait(urgent) == "COMPLETED"
    job.ends()
    assert job.kinds() == ["preempted", "done"]
    assert cluster.field(job.number, "Restarts") == "1"
    job.equals(whole)
    stop = job.lines("end")[0]["checkpoint"]
    assert stop is not None and 3 <= stop < STEPS
    logs = job.folder.logs
    for rank in (0, 1):
        for number in (1, 2):
            assert (logs / f"attempt-{number}" / f"rank-{rank}.stack").read_text().startswith(f"rank {rank} on n")
    assert "stopped by SIGUSR1" in (logs / "attempt-1" / "rank-0.log").read_text()
    # Two nodes took part, and rank 0's console is the job's.
    assert len({stack.host for stack in read_stacks(logs / "attempt-1")}) == 2
    assert f"done: {STEPS} steps" in job.said()


@pytest.mark.slow
def test_a_lost_node_two_requeues_and_a_finished_run(
    job: Job, cluster: Cluster, whole: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    job.submit()
    job.train_until(EVERY + 2)
    # The power of the node that the batch script is not on; SLURM finds out by itself.
    cluster.kill_node(cluster.nodes_of(job.number)[1])
    cluster.wait(job.number, "PENDING")
    cluster.wait(job.number, "RUNNING")
    cluster.clear_nodes()
    # By hand, as an administrator may.
    done = job.steps()
    until(lambda: job.steps() > done or job.steps() < done, 60, job.said())
    cluster.call("scontrol", "requeue", job.number)
    cluster.wait(job.number, "PENDING")
    cluster.wait(job.number, "RUNNING")
    # And as a user may try it.
    starts = len(job.lines("start"))
    until(
        lambda: len(job.lines("start")) > starts - 1 and "resume" in str(job.folder.events().read()[-1]), 90, job.said()
    )
    assert fake_interrupt(["preemption", job.number]) == 0
    assert "saved and stopped after" in capsys.readouterr().out
    job.ends()
    job.equals(whole)
    restarts = int(cluster.field(job.number, "Restarts"))
    assert restarts >= 3
    # Requeued once more, although it is done: nothing is started.
    starts, before = len(job.lines("start")), job.folder.metrics_file.read_bytes()
    cluster.call("scontrol", "requeue", job.number)
    job.ends()
    assert int(cluster.field(job.number, "Restarts")) == restarts + 1
    assert "trained to its end already: nothing to do" in job.said()
    assert len(job.lines("start")) == starts and job.folder.metrics_file.read_bytes() == before


@pytest.mark.slow
def test_crashes_and_hangs(job: Job, whole: list[float]) -> None:
    """One rank after the other: a segfault, an abort, a kill, SIGSTOP, and a sleep in Python."""
    faults = {
        "1": ["segfault", 1, 22], "2": ["abort", 0, 43], "3": ["kill", 1, 50], "4": ["stop", 1, 64], "5": ["sleep", 0, 88],
        "6": ["error", 1, 95],
    }  # fmt: skip
    job.submit(faults=faults, MEGAGAMMA_SUPERVISE="--hang_minutes 0.3 --max_failures 9")
    job.ends()
    assert job.kinds() == ["failed", "failed", "failed", "hung", "hung", "failed", "done"], job.said()
    codes = [line["code"] for line in job.lines("end")]
    assert codes[:3] == [139, 134, 137] and codes[5] == 70
    job.equals(whole)
    stopped, asleep = job.lines("hang")
    # The rank that was stopped gives no stack; of two that do, one waits in a collective operation.
    assert (stopped["ranks"], stopped["answered"], stopped["of"]) == ([1], 1, 2)
    assert (asleep["ranks"], asleep["answered"], asleep["of"]) == ([0], 2, 2)
    assert "faulty_rank.py" in asleep["places"][0]


@pytest.mark.slow
def test_the_time_limit(job: Job, cluster: Cluster, whole: list[float]) -> None:
    """SLURM's own signal, half a minute before it is due: saved, requeued, resumed."""
    faults = {"1": ["slow", 0, 1]}
    # Each step of the first attempt waits for the disk, so that it lasts.
    job.options += ["--checkpoint.interval", "1"]
    job.submit("--time=2", "--signal=B:USR1@60", faults=faults)
    job.ends()
    job.equals(whole)
    # The limit holds for each start: a slow machine may meet it more than once.
    kinds = job.kinds()
    assert kinds == ["preempted"] * (len(kinds) - 1) + ["done"] and len(kinds) > 1
    assert int(cluster.field(job.number, "Restarts")) == len(kinds) - 1


@pytest.mark.slow
def test_a_slow_file_system_is_no_hang(job: Job, whole: list[float]) -> None:
    """Each fsync takes a second: saves of several are not taken for a hang."""
    job.submit(faults={"all": ["slow", 0, 2]}, MEGAGAMMA_SUPERVISE="--hang_minutes 0.25")
    job.ends()
    assert job.kinds() == ["done"] and job.lines("hang") == []
    job.equals(whole)
    saves = [event for event in job.folder.events().read() if event["event"] == "checkpoint"]
    assert all(event["seconds"] > 2 for event in saves), "the delays were real"


@pytest.mark.slow
def test_a_full_disk_and_a_corrupt_checkpoint(job: Job, cluster: Cluster, whole: list[float]) -> None:
    """What a user has to fix is not started again; the same command then resumes, from before what is corrupt."""
    job.submit(faults={"1": ["disk", 0, EVERY * 2 + 5]})
    job.ends("FAILED")
    assert cluster.field(job.number, "ExitCode") == "2:0"
    assert "cannot be written" in job.said() and job.kinds() == ["refused"]
    newest = job.folder.newest_checkpoint()
    assert newest is not None and newest.name == f"step_{EVERY * 2:08d}"
    shard = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    job.submit()
    job.ends()
    assert newest.name in job.said() and job.lines("start")[1]["checkpoint"] == EVERY * 2
    resumed = [event["step"] for event in job.folder.events().read() if event["event"] == "resume"]
    assert resumed == [EVERY], "from the one before"
    job.equals(whole)


@pytest.mark.slow
def test_scancel_saves(job: Job, cluster: Cluster, whole: list[float]) -> None:
    """And the nodes are examined before each start, where that is asked for."""
    job.submit(MEGAGAMMA_DOCTOR="--mib 4")
    job.train_until(5)
    cluster.call("scancel", job.number)
    job.ends("CANCELLED")
    until(lambda: job.kinds(), 20)
    assert job.kinds() == ["stopped"]
    assert job.folder.steps() == [job.steps()] and job.steps() < STEPS
    assert cluster.field(job.number, "Restarts") == "0"
    assert "OK: 0 failed" in job.said() and "2 ranks" in job.said()
    # A node that fails the examination keeps the run from starting.
    starts = len(job.lines("start"))
    job.submit(MEGAGAMMA_DOCTOR="--mib 4 --folder /proc/none")
    job.ends("FAILED")
    assert cluster.field(job.number, "ExitCode") == "2:0" and "FAIL" in job.said()
    assert len(job.lines("start")) == starts
    job.submit()
    job.ends()
    job.equals(whole)


@pytest.mark.slow
def test_a_chain_without_progress_ends(job: Job, cluster: Cluster, whole: list[float]) -> None:
    """The same fault at the same step: two failures in a row that left no newer checkpoint; fixed, it resumes."""
    job.submit(faults={"all": ["segfault", 1, EVERY + 3]})
    job.ends("FAILED")
    assert cluster.field(job.number, "ExitCode") == "93:0"
    assert job.kinds() == ["failed"] * 3
    assert [(line["checkpoint"]) for line in job.lines("start")] == [None, EVERY, EVERY]
    assert f"no checkpoint newer than the checkpoint of step {EVERY}" in job.said()
    # Nor do failures go on for ever that each come a bit further.
    job.submit(faults={"4": ["error", 0, EVERY * 2 + 1]}, MEGAGAMMA_SUPERVISE="--max_failures 1")
    job.ends("FAILED")
    assert cluster.field(job.number, "ExitCode") == "93:0" and "--max_failures=1" in job.said()
    job.submit()
    job.ends()
    job.equals(whole)


@pytest.mark.slow
def test_points_do_not_sink_each_other(cluster: Cluster, tmp_path: Path, data_cache: str, whole: list[float]) -> None:
    """An array of points: one runs out of memory, one diverges, one is well."""
    lines = []
    for name in ("memory", "nan", "well"):
        config = tmp_path / f"{name}.yaml"
        shutil.copy(ROOT / "configs" / "smoke.yaml", config)
        lines.append(f"{tmp_path / name}\t{config}\n")
    (tmp_path / "points.txt").write_text("".join(lines))
    (tmp_path / "faulty.sh").write_text(
        'case $SLURM_ARRAY_TASK_ID in 0) export MEGAGAMMA_FAULTS=\'{"all": ["memory", 1, 5]}\' ;;\n'
        '1) export MEGAGAMMA_FAULTS=\'{"all": ["nan", 0, 5]}\' ;; esac\n'
        f"export MEGAGAMMA_PYTHON={ROOT}/tests/support/faulty_python.sh MEGAGAMMA_TASKS_PER_NODE=1\n"
    )
    array = cluster.submit(
        "--array=0-2%2", "--nodes=2", f"--output={tmp_path}/%a.out", "launch/point.sbatch",
        *options(tmp_path, data_cache)[2:],
        MEGAGAMMA_POINTS=str(tmp_path / "points.txt"), REAL_PYTHON=cluster.env["MEGAGAMMA_PYTHON"],
        MEGAGAMMA_SITE=str(tmp_path / "faulty.sh"),
    )  # fmt: skip
    states = [cluster.wait(f"{array}_{task}") for task in range(3)]
    codes = [cluster.field(f"{array}_{task}", "ExitCode") for task in range(3)]
    said = [(tmp_path / f"{task}.out").read_text() for task in range(3)]
    assert states == ["FAILED", "FAILED", "COMPLETED"], said
    assert codes == ["2:0", "3:0", "0:0"], said
    log = (tmp_path / "memory" / "logs" / "attempt-1" / "rank-1.log").read_text()
    assert "out of memory" in log
    assert len(RunFolder(tmp_path / "nan").attempts().read()) == 2, "a result: not started again"
    assert losses(tmp_path / "well") == whole


@pytest.mark.slow
def test_a_launcher_per_node(job: Job, cluster: Cluster) -> None:
    """MEGAGAMMA_LAUNCHER=deepspeed: two launchers of two ranks each; a preemption reaches the ranks."""
    job.submit(MEGAGAMMA_LAUNCHER="deepspeed", MEGAGAMMA_TASKS_PER_NODE="2")
    job.train_until(3)
    slurm_conf = {"SLURM_CONF": cluster.env["SLURM_CONF"]}
    cluster.call("scancel", "--batch", "--signal=USR1", job.number, **slurm_conf)
    job.ends()
    assert job.kinds() == ["preempted", "done"], job.said()
    assert "on 4 x cpu" in job.said()
    assert [line["first_sample"] for line in metrics(job.folder.path)] == [BATCH * step for step in range(STEPS)]
    losses(job.folder.path)
