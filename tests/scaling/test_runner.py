"""Sweeps run for real: points forked, killed, diverged, ended early, resumed; and what the table says then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.slurm import until
from support.sweeps import table, write_study

from megagamma.commands import sweep as command
from megagamma.errors import ConfigurationError
from megagamma.scaling.folder import SweepFolder
from megagamma.scaling.points import expand
from megagamma.scaling.runner import Runner, code_of_point, divide, is_lost
from megagamma.scaling.spec import StopLost, read_sweep

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("forked")]
BASE = {"set": {"run.steps": 12, "checkpoint.interval": 4, "validation.interval": 6}}


def write(folder: Path, cache: str, **changes: Any) -> Path:
    return write_study(folder, cache, BASE, **changes)


def lock_of(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / ".lock").read_text())
    except (OSError, ValueError):
        return None


def start(path: Path, state: Path) -> subprocess.Popen[str]:
    command_line = [sys.executable, "tools/sweep.py", "run", str(path), "--state", str(state), "--at_once", "2"]
    return subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_of(state: Path, point: str) -> int:
    return sum(len(file.read_text().splitlines()) for file in state.glob(f"points/{point}*/metrics.jsonl"))


# Long enough to be met on the way.
LENGTH = {"run.steps": 50, "checkpoint.interval": 10, "validation.interval": 25}


@pytest.mark.launcher
def test_kills_change_nothing(tmp_path: Path, data_cache: str) -> None:
    """A point killed, then the runner killed: the same command ends with the table of an undisturbed sweep, to the bit."""
    # Two data-parallel ranks: their number alone makes no other point.
    axes = {"ranks": {"one": {}, "two": {"guard.replica_interval": 50, "launch": {"processes": 2}}}}
    path = write(tmp_path, data_cache, axes=axes, seeds=[1], set=LENGTH)
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    assert command.main(["run", str(path), "--state", str(calm), "--at_once", "2"]) == 0

    runner = start(path, rough)
    point = until(lambda: next(iter(rough.glob("points/two*/.lock")), None)).parent
    until(lambda: steps_of(rough, "two") >= 2)
    os.kill(lock_of(point)["pid"], signal.SIGKILL)
    until(lambda: '"attempt": 2' in (point / "attempts.jsonl").read_text())
    runner.kill()
    runner.wait()
    assert not (rough / "table.csv").exists()

    assert command.main(["run", str(path), "--state", str(rough), "--at_once", "2"]) == 0
    expected = table(calm)
    assert table(rough) == expected
    assert len(expected) == 2 * 2 and {row["status"] for row in expected} == {"done"}
    last = {row["point"]: float(row["loss"]) for row in expected if row["is_last"] == "True"}
    assert last["one-seed1"] == pytest.approx(last["two-seed1"], rel=1e-5)
    lines = [json.loads(line) for line in (point / "attempts.jsonl").read_text().splitlines()]
    assert [line.get("kind") for line in lines if line["event"] == "end"] == ["failed", "done"]
    assert "SIGKILL" in lines[1]["problem"] and [line["event"] for line in lines] == [
        "start", "end", "start", "start", "end",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.launcher
def test_a_cancelled_sweep_saves_and_resumes(tmp_path: Path, data_cache: str) -> None:
    length = {**LENGTH, "run.steps": 200}
    path, state = write(tmp_path, data_cache, axes={"init.gamma": [1.0]}, seeds=[1], set=length), tmp_path / "state"
    runner = start(path, state)
    until(lambda: steps_of(state, "gamma1") >= 2)
    assert command.main(["cancel", str(path), "--state", str(state)]) == 0
    assert runner.wait(60) == 75
    assert "the same command resumes" in runner.communicate()[0]
    stopped = steps_of(state, "gamma1")
    (point,) = state.glob("points/gamma1*")
    assert stopped < 200 and [int(c.name[5:]) for c in sorted(point.glob("checkpoints/step_*"))][-1] == stopped
    assert command.main(["run", str(path), "--state", str(state)]) == 0
    assert command.main(["run", str(path), "--state", str(tmp_path / "calm")]) == 0
    assert table(state) == table(tmp_path / "calm")


def test_one_bad_point_does_not_sink_the_sweep(
    tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point whose loss is not finite is a result; one that fails is given up, and runs after `retry`."""
    mine = tmp_path / "tokenizer.model"
    axes = {"arm": {
        "good": {}, "wild": {"optimizer.lr": 1.0e15, "optimizer.clip_grad": 0.0}, "lost": {"tokenizer.path": str(mine)},
    }}  # fmt: skip
    path, state = write(tmp_path, data_cache, axes=axes, seeds=[1]), tmp_path / "state"
    arguments = [str(path), "--state", str(state)]
    assert command.main(["run", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "wild-seed1: diverged" in printed and "lost-seed1: failed" in printed and "given up" in printed
    assert command.main(["status", *arguments, "--json"]) == 0
    states = {entry["point"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert [states[f"{name}-seed1"]["status"] for name in ("good", "wild", "lost")] == ["done", "diverged", "given up"]
    assert "tokenizer.path" in states["lost-seed1"]["problem"]
    assert {row["point"]: row["status"] for row in table(state)} == {k: e["status"] for k, e in states.items()}

    mine.write_bytes(Path(data_cache, "tiny", "tokenizer.model").read_bytes())
    assert command.main(["run", *arguments]) == 1  # it stays given up until somebody says otherwise
    assert command.main(["retry", *arguments]) == 0
    assert command.main(["run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": started") == 1 and "lost-seed1: done" in printed

    # A folder of another name is still the point; another seed is a new one; nothing else runs.
    before = table(state)
    (renamed,) = state.glob("points/good-*")
    renamed.rename(renamed.with_name("whatever"))
    path = write(tmp_path, data_cache, axes=axes, seeds=[1, 2], exclude=[{"arm": "wild"}, {"arm": "lost"}])
    assert command.main(["run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "2 points, 1 finished" in printed and printed.count(": started") == 1
    assert [row for row in table(state) if row["seed"] == "1"] == [row for row in before if row["arm"] == "good"]
    path = write(tmp_path, data_cache, axes=axes, seeds=[1])

    # Another version of the code is reported, and redone only where asked.
    monkeypatch.setattr(command, "code_hash", lambda: "another")
    assert command.main(["run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "3 points were trained, in whole or in part, by another version" in printed and ": started" not in printed
    assert command.main(["run", *arguments, "--strict_code"]) == 0
    assert capsys.readouterr().out.count(": started") == 3
    assert table(state) == before
    assert len(list(state.glob("points/*.before-1"))) == 3


def test_a_tuned_point_that_is_behind_is_ended(tmp_path: Path, data_cache: str) -> None:
    axes = {"optimizer.lr": {"values": [0.003, 1e-9], "tuned": True}}
    options = {"run.steps": 4000, "validation.interval": 2, "validation.windows": 2, "checkpoint.interval": 0}
    path = write(tmp_path, data_cache, axes=axes, seeds=[1], set=options, stop_lost={"after": 0.002, "margin": 0.2})
    sweep, folder = read_sweep(path), SweepFolder(tmp_path / "state")
    with folder.lock():
        folder.claim(sweep)
        states = folder.states(expand(sweep, folder.points), sweep.retries)
        command.register(folder, states, command.code_hash(), on_cpus=True)
        said: list[str] = []
        runner = Runner(folder, states, divide(2, 1, False), 0, sweep.stop_lost, said.append, look_seconds=0.1)

        def stop_when_ended(text: str) -> None:
            said.append(text)
            if "behind" in text:
                os.kill(os.getpid(), signal.SIGTERM)  # the other one need not go on

        runner.say = stop_when_ended
        assert runner.run() == 75
    assert [state.status for state in states] == ["stopped", "behind"]
    assert any("its loss is behind the best of its group" in text for text in said)
    # Of arms that are compared none is ended for the other's sake: only those of a tuned axis are a group.
    state, other = states
    rule = StopLost(0.0001, 0.0)
    assert is_lost(other, states, rule)
    assert not is_lost(state, states, rule)
    for one in states:
        one.point = replace(one.point, tuned=())
    assert not is_lost(other, states, rule)


def test_refusals(tmp_path: Path, data_cache: str) -> None:
    path, state = write(tmp_path, data_cache, axes={"init.gamma": [1.0]}, seeds=[1]), tmp_path / "state"
    arguments = [str(path), "--state", str(state)]
    with pytest.raises(ConfigurationError, match="was not run yet: megagamma sweep run"):
        command.main(["status", *arguments])
    folder = SweepFolder(state)
    state.mkdir()
    with folder.lock(), pytest.raises(ConfigurationError, match=r"sweep=.*in use by process"):
        command.main(["run", *arguments])
    folder.claim(read_sweep(path))
    other = write(tmp_path, data_cache, axes={"model.qk_norm": [True]}, seeds=[1])
    with pytest.raises(ConfigurationError, match="is the folder of another sweep"):
        command.main(["plan", str(other), "--state", str(state)])
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"is no sweep's folder"):
        command.main(["run", str(path), "--state", str(notes)])
    with pytest.raises(ConfigurationError, match="--at_once 0 must be at least 1"):
        divide(0, 1, False)


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([75, 75], 75), ([2, -9], -9), ([3, 3], 3), ([2, 3], 3), ([0, 70], 70), ([75, 2], 2), ([2, 1], 1)],
)
def test_the_cause_among_ranks(codes: list[int], code: int) -> None:
    assert code_of_point(codes) == code
