"""Actions that start nothing, on a folder whose points were written here: plan, status, collect, retry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import write

from megagamma.commands import sweep as command
from megagamma.errors import CheckpointError, ConfigurationError
from megagamma.scaling.collect import machine_warnings, rows_of
from megagamma.scaling.folder import PointState, SweepFolder
from megagamma.scaling.grid import COLUMNS
from megagamma.scaling.plan import Speed, make_plan, speed_of
from megagamma.scaling.points import expand
from megagamma.scaling.spec import read_sweep


def finish(state: PointState, kind: str = "done", device: str = "cpu", dtype: str = "fp32", world: int = 1) -> None:
    """Write the files of a point that has ended."""
    state.folder.mkdir(parents=True, exist_ok=True)
    (state.folder / "point.json").write_text(json.dumps({"hash": state.hash, "code": ""}))
    lines: list[dict[str, Any]] = [
        {"event": "start", "chain": "a"},
        {"event": "end", "kind": kind, "code": 0, "seconds": 1.0},
    ]
    (state.folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resolved = {"device": device, "dtype": dtype, "parallel": {"world": world}}
    (state.folder / "resolved.json").write_text(json.dumps(resolved))
    if kind == "done":
        steps = state.point.steps
        line = {
            "step": steps,
            "tokens": state.point.tokens,
            "loss": 3.0,
            "val/tiny/loss": 2.5,
            "seconds": 1.0,
            "tflops": 2.0,
        }
        (state.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (state.folder / "events.jsonl").write_text(json.dumps({"event": "end", "step": steps}) + "\n")


def folder_of(path: Path, state: Path) -> tuple[SweepFolder, list[PointState]]:
    """A claimed folder and its points, none of which was run."""
    sweep, folder = read_sweep(path), SweepFolder(state)
    folder.claim(sweep)
    return folder, folder.states(expand(sweep, folder.points), sweep.retries)


def machine_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "finished points" in line]


def test_points_of_other_machines_are_reported(
    tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By plan, at a start and by collect, in a line each for device, dtype and world; where the config leaves it open."""
    given = {"data.cache": data_cache, "precision.dtype": "auto"}
    path = write(tmp_path, set=given, launch={"processes": 1}, rules={})
    folder, states = folder_of(path, tmp_path / "state")
    arguments = [str(path), "--state", str(folder.path)]
    for state in states[:3]:
        finish(state)
    assert command.main(["collect", *arguments]) == 0
    assert machine_lines(capsys.readouterr().out) == []
    finish(states[3], device="cuda", dtype="bf16", world=2)
    names = [state.point.name for state in states]
    expected = [
        f"WARNING finished points differ in device (cpu: {', '.join(names[:3])}; cuda: {names[3]}): their losses may differ "
        "by it: set run.device, and run them again",
        f"WARNING finished points differ in dtype (bf16: {names[3]}; fp32: {', '.join(names[:3])}): their losses may differ "
        "by it: set precision.dtype, and run them again",
        f"WARNING finished points ran with world 2 where launch.processes is 1: {names[3]}",
    ]  # fmt: skip
    for action in (["collect"], ["plan", "--device", "H100"]):
        assert command.main([action[0], *arguments, *action[1:]]) == 0
        assert machine_lines(capsys.readouterr().out) == expected
    states = folder.states([state.point for state in states], 2)
    said: list[str] = []
    command.notice_other_code(states, False, command.code_hash(), said.append)
    assert said[:3] == expected and "another version of the code" in said[3]
    assert {state.status for state in states[:4]} == {"done"}  # a result is a result
    # What the config says is no surprise.
    for state in states:
        state.point.config.run.device, state.point.config.precision.dtype = "cuda", "bf16"
    assert [line for line in machine_warnings(states) if "world" not in line] == []


def test_no_column_of_the_table_is_forgotten(tmp_path: Path, data_cache: str) -> None:
    """An axis of that name would overwrite it."""
    path = write(tmp_path, set={"data.cache": data_cache}, rules={})
    folder, states = folder_of(path, tmp_path / "state")
    finish(states[0])
    rows = rows_of(read_sweep(path), folder.states([state.point for state in states], 2))
    assert {key for row in rows for key in row} - {"size", "init.gamma"} == set(COLUMNS)


def test_retry_is_for_points_that_have_failed(
    tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, set={"data.cache": data_cache}, rules={})
    folder, states = folder_of(path, tmp_path / "state")
    for state, kind in zip(states, ("done", "diverged", "refused", "behind"), strict=False):
        finish(state, kind)
    done, diverged, _, behind, pending, *_ = (state.point.name for state in states)
    arguments = ["retry", "--state", str(folder.path), str(path)]
    for name, status in ((done, "done"), (pending, "pending")):
        with pytest.raises(ConfigurationError, match=rf"^{name}: is {status}: retry is for points that are given up"):
            command.main([*arguments, diverged, name])
    with pytest.raises(ConfigurationError, match="none: is not a point of"):
        command.main([*arguments, "none"])
    before = [state.status for state in folder.states([state.point for state in states], 2)]
    assert before[:4] == ["done", "diverged", "given up", "behind"]
    assert command.main(arguments) == 0 and "1 points may run again" in capsys.readouterr().out
    assert command.main([*arguments, diverged, behind]) == 0 and "2 points may run again" in capsys.readouterr().out
    after = [state.status for state in folder.states([state.point for state in states], 2)]
    assert after[:4] == ["done", "stopped", "stopped", "stopped"]


def test_a_plan_with_budgets_needs_no_folder_of_its_own(
    tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, set={"data.cache": data_cache}, rules={})
    folder, _ = folder_of(path, tmp_path / "state")
    arguments = [str(path), "--state", str(folder.path)]
    before = folder.identity_file.read_bytes()
    assert command.main(["plan", *arguments, "--device", "H100", "--budget", "1e12", "4e12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == 16
    assert folder.identity_file.read_bytes() == before
    with pytest.raises(ConfigurationError, match="is the folder of another sweep"):
        command.main(["collect", *arguments, "--budget", "1e12"])
    # And the other way round; but a sweep with other axes is another one.
    SweepFolder(tmp_path / "budgets").claim(read_sweep(path, (1e12,)))
    assert command.main(["plan", str(path), "--state", str(tmp_path / "budgets"), "--device", "H100"]) == 0
    other = write(tmp_path, set={"data.cache": data_cache}, rules={}, axes={"init.gamma": [1.0]})
    with pytest.raises(ConfigurationError, match="is the folder of another sweep"):
        command.main(["plan", str(other), "--state", str(folder.path), "--budget", "1e12"])


def test_a_plan_of_data_or_a_trunk_that_is_not_there(
    tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and the plan; status says the same as its error. An embedded text is prepared by `run`."""
    trunk, data = str(tmp_path / "trunk"), str(tmp_path / "data")
    cases = [
        ({"data.cache": data_cache, "run.branch_from": trunk}, f"run.branch_from={trunk}: {trunk}: there is no such folder"),
        ({"data.corpus": "", "data.paths": [data], "model.vocab_size": 512}, f"data: folder '{data}' does not exist"),
        ({"data.cache": data_cache, "validation.paths": {"own": data}}, f"data: folder '{data}' does not exist"),
        ({"data.cache": data}, ""),
    ]  # fmt: skip
    for options, message in cases:
        path = write(tmp_path, set=options, rules={})
        assert command.main(["plan", str(path), "--state", str(tmp_path / "new"), "--device", "H100"]) == 0
        printed = capsys.readouterr().out
        lines = [line for line in printed.splitlines() if "none is known to be finished" in line]
        assert "sweep study: 8 points, 0 finished" in printed
        assert len(lines) == bool(message) and all(line.startswith(f"WARNING {message}") for line in lines)
    path = write(tmp_path, set=cases[0][0], rules={})
    SweepFolder(tmp_path / "state").claim(read_sweep(path))
    with pytest.raises(CheckpointError, match=r"^run\.branch_from=.*trunk: there is no such folder"):
        command.main(["status", str(path), "--state", str(tmp_path / "state")])


def test_processes_share_the_cores_of_a_machine(tmp_path: Path, data_cache: str) -> None:
    """On CPUs two processes are no faster than one, and two nodes are; each GPU is a process' own."""
    axes = {"launch": {"one": {}, "two": {"guard.max_skips": 1, "launch": {"processes": 2}}, "nodes": {
        "guard.max_skips": 2, "launch": {"processes": 4, "nodes": 2}}}}  # fmt: skip
    path = write(tmp_path, set={"data.cache": data_cache}, rules={}, axes=axes, seeds=[1])
    sweep = read_sweep(path)
    points = expand(sweep, Path("points"))
    for device, shares in (("cpu", [1, 1, 2]), ("cuda", [1, 2, 4])):
        rows = make_plan(sweep, points, [], Speed(1e12, "stated", device), False)["rows"]
        assert [row["flops"] / 1e12 / row["seconds"] for row in rows] == pytest.approx(shares)
    # Measured: 2 TFLOP/s of each finished point as a whole.
    folder, states = folder_of(path, tmp_path / "state")
    for index, gpu, expected in ((0, False, 2e12), (1, False, 2e12), (2, False, 1e12), (2, True, 5e11)):
        finish(states[index])
        (state,) = folder.states([states[index].point], 0)
        assert speed_of([state], "", None, gpu).flops_per_second == expected
