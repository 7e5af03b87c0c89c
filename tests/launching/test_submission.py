"""What `sweep submit` asks SLURM for: seen by --dry_run, in this process, without a SLURM."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.processes import ROOT
from support.sweeps import write_study

from megagamma.commands import convert_and_eval
from megagamma.commands import sweep as command
from megagamma.commands.__main__ import main as console
from megagamma.errors import ConfigurationError
from megagamma.files import copy_file
from megagamma.launching.sbatch_options import Option, gpus_per_node, parse, parse_text
from megagamma.launching.site import load_site
from megagamma.launching.slurm import JobState, SlurmError
from megagamma.runs.folder import RunFolder
from megagamma.scaling.folder import PointState, SweepFolder
from megagamma.scaling.points import expand
from megagamma.scaling.requests import Group, follow_options, groups_of, point_options
from megagamma.scaling.spec import Launch, read_sweep
from megagamma.scaling.submit import Submission, _is_ours

BASE: dict[str, Any] = {"axes": {"init.gamma": [0.5, 1.0]}, "seeds": [1], "launch": {"processes": 2, "nodes": 2}}


@pytest.fixture(autouse=True)
def _outside_of_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "MEGAGAMMA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def submitted(path: Path, *more: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Jobs that would be submitted; standard output is one JSON object."""
    capsys.readouterr()
    state = path.parent / "state"
    assert command.main(["submit", str(path), "--state", str(state), "--dry_run", "--json", *more]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {"point", "hash", "status", "folder"} == set(values["points"][0]) and not state.exists()
    return values["jobs"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--partition=gpu -N4 --exclusive", [("partition", "gpu"), ("nodes", "4"), ("exclusive", None)]),
        ("-p a,b --gres gpu:8 -t 10", [("partition", "a,b"), ("gres", "gpu:8"), ("time", "10")]),
        ("-HQ -n2 --comment='a b'", [("hold", None), ("quiet", None), ("ntasks", "2"), ("comment", "a b")]),
        ("--requeue --mem 0", [("requeue", None), ("mem", "0")]),
    ],
)
def test_options_however_they_are_written(text: str, expected: list[tuple[str, str | None]]) -> None:
    assert parse_text(text, "--sbatch") == expected


def test_gpus_however_they_are_asked_for() -> None:
    cases = {"--gres=gpu:8": 8, "--gres=gpu:a100:4,shard:2": 4, "--gpus-per-node h100:8": 8, "--gres=gpu": 1,
             "--gres=lustre:1": None, "--gpus=16": None, "--gpus-per-node=2 --gres=gpu:4(S:0-1)": 4}  # fmt: skip
    assert {text: gpus_per_node(parse(text.split())) for text in cases} == cases


def test_every_group_has_a_name_of_its_own(tmp_path: Path, data_cache: str) -> None:
    """Arms of an axis that sets no size may be started in other ways: their arrays read other lists."""
    arms = {
        "a": {},
        "b": {"optimizer.lr": 0.001, "launch": {"time": "20"}},
        "c": {"optimizer.lr": 0.002, "launch": {"time": "30"}},
    }
    axes = {"arm": arms, "init.gamma": [0.5, 1.0]}
    sweep = read_sweep(write_study(tmp_path, data_cache, {**BASE, "axes": axes}), None, None)
    states = [PointState(point, "", tmp_path / point.name, "pending") for point in expand(sweep, tmp_path)]
    groups = groups_of(sweep, states)
    assert [(group.name, group.launch.time) for group in groups] == [
        ("study", ""),
        ("study-2", "20"),
        ("study-3", "30"),
    ]
    assert [state for group in groups for state in group.states] == states


def test_a_site_does_not_decide_ranks(tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MEGAGAMMA_TASKS_PER_NODE of a site file is read after the variables of the job."""
    site, points = tmp_path / "site.sh", tmp_path / "points.txt"
    site.write_text("export MEGAGAMMA_TASKS_PER_NODE=8\n")
    points.write_text("runs/a\tconfigs/smoke.yaml\n")
    given = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MEGAGAMMA_PYTHON": sys.executable, "MEGAGAMMA_DRY_RUN": "1",
        "MEGAGAMMA_SITE": str(site), "MEGAGAMMA_POINTS": str(points), "SLURM_JOB_NUM_NODES": "2",
    }  # fmt: skip

    def ranks(**more: str) -> str:
        done = subprocess.run(
            ["bash", "launch/point.sbatch"],
            cwd=ROOT,
            env={**given, **more},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    assert " --ntasks=16 --ntasks-per-node=8 " in ranks(), "of a job that does not say"
    assert " --ntasks=4 --ntasks-per-node=2 " in ranks(MEGAGAMMA_POINT_TASKS="2", MEGAGAMMA_POINT_NODES="2")
    assert "error: the job has 2 nodes, and its point is for 1" in ranks(MEGAGAMMA_POINT_NODES="1")


def test_options_of_a_site_and_a_command(
    tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.sh"
    site.write_text("export MEGAGAMMA_SBATCH='-p long,short --exclusive --gres gpu:8 -A mine --mem=0 --ntasks=64'\n")
    monkeypatch.setenv("MEGAGAMMA_SITE", str(site))
    path = write_study(tmp_path, data_cache, BASE)
    points, collect, evaluate = submitted(path, "--sbatch=-t 30 -x n1", "--evaluate", "--tasks quick", capsys=capsys)
    options = [str(option) for option in parse(points["options"])]
    for word in ("--partition=long,short", "--account=mine", "--exclusive", "--gres=gpu:8", "--mem=0", "--time=30",
                 "--exclude=n1", "--nodes=2", "--ntasks-per-node=1", "--export=ALL"):  # fmt: skip
        assert options.count(word) == 1, word
    assert "--ntasks=64" not in options and points["variables"]["MEGAGAMMA_POINT_TASKS"] == "1"
    # What follows is one process: where it may run and who pays are kept, what it takes is its own.
    named = {option.name: option.value for option in parse(collect["options"])}
    assert named["partition"] == "long,short" and named["account"] == "mine" and named["time"] == "60"
    assert not {"exclusive", "gres", "mem", "exclude"} & set(named) and named["ntasks"] == "1" == named["nodes"]
    assert "--time=240" in evaluate["options"] and evaluate["arguments"][-2:] == ["--tasks", "quick"]
    _, collect = submitted(path, "--follow_sbatch", "-t 5 --mem=8G -p short", capsys=capsys)
    assert {"--time=5", "--mem=8G", "--partition=short"} <= set(collect["options"])


def test_environments_that_are_not_handed_on(
    tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, data_cache, BASE)
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    for job in submitted(path, capsys=capsys):
        (given,) = [word for word in job["options"] if word.startswith("--export=")]
        assert given == f"--export={','.join(job['variables'])}" and "MEGAGAMMA_HOME" in given


def test_inside_of_a_container_is_another_python(
    tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, data_cache, BASE)
    plain = submitted(path, capsys=capsys)[0]["variables"]
    assert plain["MEGAGAMMA_PYTHON"] == sys.executable and "MEGAGAMMA_HOST_PYTHON" not in plain
    site = tmp_path / "site.sh"
    site.write_text("export MEGAGAMMA_CONTAINER='apptainer exec docker://image'\n")
    monkeypatch.setenv("MEGAGAMMA_SITE", str(site))
    for job in submitted(path, capsys=capsys):
        assert job["variables"]["MEGAGAMMA_HOST_PYTHON"] == sys.executable
        assert "MEGAGAMMA_PYTHON" not in job["variables"], "the container's own"


def test_points_that_cannot_work_are_refused(
    tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As plan refuses them; and options that the sweep decides, and devices that are not known."""
    arguments = ["--state", str(tmp_path / "state"), "--dry_run"]
    tight = write_study(tmp_path, data_cache, BASE, set={"parallel.memory_gib": 0.001})
    with pytest.raises(ConfigurationError, match=r"point gamma0.5-seed1: .*parallel.memory_gib"):
        command.main(["submit", str(tight), *arguments])
    path = write_study(tmp_path, data_cache, BASE, stop_lost={"after": 0.5, "margin": 0.2})
    for more, message in (
        (["--sbatch=--nodes=3"], r"--sbatch --nodes=3: is decided by launch of the sweep's file: leave it out"),
        (["--sbatch=-n 3"], r"--sbatch --ntasks=3: is decided by launch"),
        (["--sbatch=--array=0"], r"--sbatch --array=0: is decided by --throttle"),
        (["--sbatch", "gpu"], r"--sbatch: gpu is no option of sbatch: give --name=value"),
        (["--sbatch=--comment='a"], r"--sbatch=--comment='a: No closing quotation: close the quote"),
        (["--device", "H999"], r"--device H999: its peak is not known"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            command.main(["submit", str(path), *arguments, *more])
    capsys.readouterr()
    assert command.main(["submit", str(path), *arguments, "--device", "H100", "--mfu", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "50% MFU (stated) of H100" in said and "WARNING stop_lost: points that are jobs" in said


def group(processes: int, nodes: int = 1) -> Group:
    return Group("study", Launch(processes, nodes), (), True)


def test_gpus_of_points_and_of_an_evaluation() -> None:
    def words(processes: int, shared: str, extras: str = "", has_gpus: bool = True) -> list[str]:
        options = point_options(group(processes), parse(shared.split()), parse(extras.split()), "", has_gpus)
        return [str(option) for option in options if "g" in option.name]

    assert words(4, "") == ["--gpus-per-node=4"] and words(4, "", has_gpus=False) == []
    assert words(4, "--gres=gpu:8") == ["--gres=gpu:8"], "not mixed with another way"
    assert words(4, "--gpus-per-node=8") == ["--gpus-per-node=4"] and words(4, "", "-G 4") == ["--gpus=4"]
    for shared, extras in (("--gres=gpu:2", ""), ("", "--gpus-per-node=2")):
        with pytest.raises(ConfigurationError, match=r"have 4 processes on each node.* ask for 2 GPUs: ask for 4"):
            words(4, shared, extras)
    assert Option("gpus-per-node", "1") in follow_options("evaluate", [], "", 9999, True)
    assert Option("gpus-per-node", "1") not in follow_options("collect", [], "", 9999, True)
    assert Option("gpus-per-node", "1") not in follow_options("evaluate", [], "--gres=gpu:2", 9999, True)
    assert Option("time", "30") in follow_options("evaluate", [], "", 30, True), "the partition's limit"


def test_submitting_needs_no_torch() -> None:
    """A login node's Python may have none, and a second of imports is long for `status`."""
    code = (
        "import sys, megagamma.commands.sweep; print([name for name in ('torch', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_follows_understands_its_words(tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of the chained jobs, given to the console script: of a sweep whose name is that of its file, and whose
    DeepSpeed file was edited after it was submitted."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "ds.json").write_bytes((tmp_path / "ds.json").read_bytes())
    path = write_study(
        tmp_path,
        data_cache,
        {**BASE, "config": str(ROOT / "configs" / "smoke.yaml")},
        set={"deepspeed_config": "ds.json"},
    )
    values = yaml.safe_load(path.read_text())
    del values["name"]
    path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    arguments = [str(path), "--state", str(tmp_path / "state"), "--evaluate", "--tasks quick --limit 2"]
    sweep, folder = read_sweep(path), SweepFolder(tmp_path / "state")
    submission = Submission(command.build_parser().parse_args(["submit", *arguments]), sweep, folder, load_site())
    folder.claim(sweep)
    for state in folder.states(expand(sweep, folder.points), 0):
        folder.register(state, "code", None)
        RunFolder(state.folder).events().write({"event": "end", "step": state.point.steps})
    copy_file(path, submission._frozen)
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))

    words = submission.follow_arguments(tree)
    assert console(words["collect"]) == 0
    with open(folder.csv_file) as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["done", "done"]
    given: list[list[str]] = []
    monkeypatch.setattr(convert_and_eval, "convert_and_score", lambda words: given.append(words) or (0, []))
    assert console(words["evaluate"]) == 0
    assert given[0][-4:] == ["--tasks", "quick", "--limit", "2"] and len(given[0]) == 8
    assert given[0][2:4] == ["--eval_out", str(folder.path / "scores")]
    options = command.build_parser().parse_args(["submit", str(path), "--evaluate", "--tasks 'x"])
    with pytest.raises(ConfigurationError, match="--evaluate --tasks 'x: No closing quotation"):
        Submission(options, sweep, folder, load_site())


def test_a_type_of_gpu_stays() -> None:
    group = Group("study", Launch(4, 1), (), True)
    found = point_options(group, parse(["--gpus-per-node=h100:8"]), [], "", True)
    assert Option("gpus-per-node", "h100:4") in found
    assert Option("gpus-per-node", "h100:1") in follow_options(
        "evaluate", parse(["--gpus-per-node=h100:8"]), "", 60, True
    )


def test_other_clusters_are_refused(tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their jobs would not be found again, and be submitted twice."""
    arguments = [
        "submit",
        str(write_study(tmp_path, data_cache, BASE)),
        "--dry_run",
        "--state",
        str(tmp_path / "state"),
    ]
    with pytest.raises(
        ConfigurationError, match=r"--sbatch --clusters=c2: a sweep's jobs are looked up in this cluster"
    ):
        command.main([*arguments, "--sbatch=-M c2"])
    monkeypatch.setenv("SBATCH_CLUSTERS", "c2")
    with pytest.raises(ConfigurationError, match="SBATCH_CLUSTERS: a sweep's jobs are looked up"):
        command.main(arguments)


def test_a_number_that_is_another_job_by_now() -> None:
    states = [JobState("7_0", "RUNNING", "None", "study")]
    assert _is_ours({"job": "7", "name": "study"}, states)
    assert not _is_ours({"job": "7", "name": "another"}, states)
    assert _is_ours({"job": "7"}, states), "one that was submitted before names were written down"


def test_configs_of_another_job_of_the_number(tmp_path: Path) -> None:
    """A first start copies anew; a requeue keeps what the first start copied."""
    config = tmp_path / "my.yaml"
    script = """
        home=$PWD
        . launch/common.sh
        unset MEGAGAMMA_DRY_RUN
        keep_configs --config "$CONFIG"
        cat "${options[1]}"
    """

    def seen(text: str, restarts: int) -> str:
        config.write_text(text)
        given = {
            "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MEGAGAMMA_HOME": str(ROOT), "MEGAGAMMA_PYTHON": sys.executable,
            "MEGAGAMMA_DRY_RUN": "1", "MEGAGAMMA_CODE_ROOT": str(tmp_path / "copies"),
            "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "CONFIG": str(config),
        }  # fmt: skip
        return subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=given, capture_output=True, text=True, check=True
        ).stdout

    assert [seen("a", 0), seen("b", 1), seen("c", 0)] == ["a", "a", "c"]


def test_cancel_without_an_answer_of_slurm(
    tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A runner of this machine is looked for all the same."""
    path, folder = write_study(tmp_path, data_cache, BASE), SweepFolder(tmp_path / "state")
    folder.claim(read_sweep(path))
    folder.slurm.mkdir()
    folder.jobs_file.write_text(json.dumps({"kind": "points", "job": "7", "points": []}) + "\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError):
        command.main(["cancel", str(path), "--state", str(folder.path)])
    assert "nothing of study is running here" in capsys.readouterr().out
