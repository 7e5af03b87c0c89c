"""The fault drill: real faults on a real disk, and promises that can break."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megagamma.cli import main_guard
from megagamma.commands import fault_drill
from megagamma.testing import faults
from megagamma.testing.drill import Broken, Drill, Fault, require

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("forked")]

# The rest is what other tests hold one by one.
FAST = ("launched twice", "bit flip in checkpoint.json")


def drill(storage: Path, *arguments: str) -> int:
    return main_guard(lambda: fault_drill.main(["--storage", str(storage), *arguments]))


def test_faults_that_take_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "outcomes.json"
    assert drill(tmp_path / "storage", "--faults", *FAST, "--output", str(output)) == 0, capsys.readouterr().out
    outcomes = json.loads(output.read_text())["outcomes"]
    assert [outcome["fault"] for outcome in outcomes] == list(FAST)
    assert {outcome["status"] for outcome in outcomes} == {"holds"}
    assert "2 hold, 0 broken, 0 skipped" in capsys.readouterr().out
    assert not (tmp_path / "storage").exists(), "the drill leaves nothing"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = drill(tmp_path / "storage")
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"[{len(faults.FAULTS)}/{len(faults.FAULTS)}]" in said


def broken_promise(drill: Drill) -> str:
    """Metrics that are edited after the run: as if a step had been lost."""
    run = drill.train()
    lines = run.folder.metrics_file.read_text().splitlines(keepends=True)
    run.folder.metrics_file.write_text("".join(lines[1:]))
    return f"{len(drill.losses(run))} losses"


def wrong_code(drill: Drill) -> str:
    """A run that ends well where it should not."""
    drill.train(expect=2)
    return "ended"


def own_bug(drill: Drill) -> str:
    """A drill that is wrong itself."""
    raise KeyError("own")


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (broken_promise, "metrics.jsonl holds the steps [2, 3, 4, 5, 6, 7, 8]"),
        (wrong_code, "exit codes [0] in place of 2"),
        (own_bug, "KeyError: 'own'"),
    ],
)
def test_a_promise_that_does_not_hold_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make, seen: str
) -> None:
    monkeypatch.setitem(faults.FAULTS, "own", Fault("own", "nothing", make))
    assert drill(tmp_path / "storage", "--faults", "own") == 1
    said = capsys.readouterr().out
    assert "own: BROKEN" in said and seen in said and "0 hold, 1 broken, 0 skipped" in said


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert drill(tmp_path / "mine") == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert drill(tmp_path / "new", "--faults", "earthquake") == 2
    assert "--faults 'earthquake': there is no such fault" in capsys.readouterr().err
    assert drill(tmp_path / "new", "--list") == 0
    assert capsys.readouterr().out.count("\n") == len(faults.FAULTS)
    with pytest.raises(Broken, match="seen"):
        require(False, "seen")
