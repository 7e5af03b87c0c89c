"""What may go wrong around points that run: kills at bad moments, foreign processes, mixed versions of the code."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megagamma.commands import sweep as command
from megagamma.files import write_text
from megagamma.runs.lock import RunLock
from megagamma.scaling import runner as runners
from megagamma.scaling.folder import PointState, SweepFolder
from megagamma.scaling.points import expand
from megagamma.scaling.runner import Runner, divide
from megagamma.scaling.spec import read_sweep

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("forked")]


def write(folder: Path, cache: str, **changes: Any) -> Path:
    options = {
        "data.cache": cache, "run.steps": 4, "logging.sample_tokens": 0, "checkpoint.interval": 2,
        "validation.interval": 2, **changes.pop("set", {}),
    }  # fmt: skip
    values = {
        "name": "study",
        "config": "configs/smoke.yaml",
        "set": options,
        "axes": {"init.gamma": [1.0]},
        "seeds": [1],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return path


def registered(path: Path, folder: SweepFolder) -> list[PointState]:
    """The states of a sweep's points, as `run` makes them; call under the folder's lock."""
    sweep = read_sweep(path)
    folder.claim(sweep)
    states = folder.states(expand(sweep, folder.points), sweep.retries)
    command.register(folder, states, command.code_hash(), on_cpus=True)
    return states


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_end(state: Path) -> Path:
    """A point as a kill leaves it that came after the last checkpoint, and before the end was written down."""
    (point,) = state.glob("points/gamma1*")
    events = [line for line in lines(point / "events.jsonl") if line["event"] != "end"]
    write_text(point / "events.jsonl", "".join(json.dumps(line) + "\n" for line in events))
    return point


def test_a_kill_between_the_last_checkpoint_and_the_end(
    tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The point is done at its next start; and where it does not become so, its attempts are counted and end."""
    path, state = write(tmp_path, data_cache), tmp_path / "state"
    arguments = ["run", str(path), "--state", str(state)]
    assert command.main(arguments) == 0
    before = (state / "table.csv").read_text().splitlines()
    point = without_end(state)
    assert command.main(arguments) == 0
    assert [line["event"] for line in lines(point / "events.jsonl")][-2:] == ["resume", "end"]
    after = (state / "table.csv").read_text().splitlines()
    assert len(after) == len(before) == 3 and all(",done," in line for line in after[1:])

    # The negative control: a run that ends with 0, and never says that it is done.
    without_end(state)
    monkeypatch.setattr(runners, "launch", lambda *_, **__: [_Ended(0)])
    capsys.readouterr()
    assert command.main(arguments) == 1
    printed = capsys.readouterr().out
    assert printed.count(": started") == 3 and "exit code 0 before its last step" in printed
    assert command.main(arguments) == 1
    assert ": started" not in capsys.readouterr().out


class _Ended:
    """A process that has ended: the runner looks at nothing else of one."""

    def __init__(self, code: int) -> None:
        self.exitcode, (self.sentinel, write_end) = code, os.pipe()
        os.close(write_end)


def test_a_signal_while_points_are_started(tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the points that were not yet known to the runner."""
    path = write(tmp_path, data_cache, set={"run.steps": 100_000})
    folder, launch, began = SweepFolder(tmp_path / "state"), runners.launch, time.monotonic()

    def interrupted(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return launch(*args, **named)

    monkeypatch.setattr(runners, "launch", interrupted)
    folder.path.mkdir()
    with folder.lock():
        states = registered(path, folder)
        assert Runner(folder, states, divide(1, 1, False), 0, say=lambda _: None).run() == 75
    assert states[0].status == "stopped" and time.monotonic() - began < 100


def test_points_of_other_processes(
    tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point in use keeps no other one waiting, and is left to whoever runs it, or is run when that one ends."""
    monkeypatch.setattr(runners, "_LOCK_SECONDS", 1.0)
    path, folder = write(tmp_path, data_cache, seeds=[1, 2, 3]), SweepFolder(tmp_path / "state")
    said: list[str] = []
    folder.path.mkdir()
    with folder.lock():
        states = registered(path, folder)
        states[2].status = "queued"
        with RunLock(states[0].folder):
            runner = Runner(folder, states, divide(1, 1, False), 0, say=said.append)
            assert runner.run() == 75
        assert [state.status for state in states] == ["running", "done", "queued"]
        starts = [text.partition(": ")[0] for text in said if ": started" in text]
        assert starts == ["gamma1-seed2"]
        assert "2 points are left to others" in said[-1]

        # It ends in time.
        monkeypatch.setattr(runners, "_LOCK_SECONDS", 60.0)
        lock = RunLock(states[0].folder)
        lock.acquire()
        timer = threading.Timer(1.0, lock.release)
        timer.start()
        states = registered(path, folder)[:1]
        assert Runner(folder, states, divide(1, 1, False), 0, say=said.append).run() == 0
        timer.join()
    assert states[0].status == "done"


def test_a_point_of_two_versions_of_the_code(
    tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point that was half trained by another version says so when it is finished, and is redone where asked."""
    path, state = write(tmp_path, data_cache, retries=0), tmp_path / "state"
    arguments = ["run", str(path), "--state", str(state)]
    monkeypatch.setattr(command, "code_hash", lambda: "old")
    assert command.main(arguments) == 0
    point = without_end(state)
    (point / "attempts.jsonl").unlink()
    monkeypatch.setattr(command, "code_hash", lambda: "new")
    assert command.main(arguments) == 0
    assert "by another version of the code" in capsys.readouterr().out
    assert json.loads((point / "point.json").read_text())["codes"] == ["old", "new"]
    assert "old new" in (state / "table.csv").read_text()
    assert command.main([*arguments, "--strict_code"]) == 0
    assert json.loads((point / "point.json").read_text())["codes"] == ["new"]
    capsys.readouterr()
    assert command.main(arguments) == 0
    assert "another version" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("printed", "kind"),
    [
        ("error: rank 1: another rank ended, or gave no answer\n", "failed"),
        ("error: data.paths: there is no such folder\n", "refused"),
    ],
)
def test_what_a_point_says_of_its_end(
    tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch, printed: str, kind: str
) -> None:
    """Exit code 2 of a rank that lost another one is no refusal; what an earlier attempt printed is no cause."""
    path, folder = write(tmp_path, data_cache), SweepFolder(tmp_path / "state")
    folder.path.mkdir()
    log = folder.logs / "gamma1-seed1.log"

    def ended(*_: Any, **__: Any) -> list[Any]:
        with open(log, "a") as file:
            file.write(printed)
        return [_Ended(2)]

    with folder.lock():
        states = registered(path, folder)
        log.write_text("error: what went wrong the day before\n")
        monkeypatch.setattr(runners, "launch", ended)
        assert Runner(folder, states, divide(1, 1, False), 0, say=lambda _: None).run() == 1
    (point,) = folder.points.glob("gamma1*")
    end = lines(point / "attempts.jsonl")[-1]
    assert end["kind"] == kind and end["problem"] == printed.removeprefix("error: ").strip()
    printed = ""
    with folder.lock():
        (point / "attempts.jsonl").unlink()
        states = registered(path, folder)
        assert Runner(folder, states, divide(1, 1, False), 0, say=lambda _: None).run() == 1
    assert lines(point / "attempts.jsonl")[-1]["problem"] == "exit code 2"
