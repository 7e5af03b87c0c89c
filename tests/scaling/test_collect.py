"""The table of a sweep, from points whose files are written here: the best of tuned values, edges, seeds that are missing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from support.sweeps import write

from megagamma.reporting.plots import save_figure
from megagamma.scaling import collect
from megagamma.scaling.collect import best_values, draw, final_loss, rows_of, summary, write_table
from megagamma.scaling.folder import PointState, SweepFolder, read_state
from megagamma.scaling.points import expand
from megagamma.scaling.spec import Sweep, read_sweep

AXES = {"init.gamma": [0.5, 1.0], "optimizer.lr": {"values": [0.001, 0.002, 0.004], "tuned": True}}


def states_of(tmp_path: Path, losses: dict[str, list[float | None]], **changes: Any) -> tuple[Sweep, list[PointState]]:
    """A sweep whose points have ended with these losses by their name without seed; None: diverged."""
    path = write(tmp_path, axes=AXES, rules={}, **changes)
    sweep = read_sweep(path)
    states = []
    for point in expand(sweep, tmp_path / "points"):
        folder = tmp_path / "points" / point.name
        folder.mkdir(parents=True)
        (folder / "point.json").write_text(json.dumps({"hash": point.name, "code": "abc"}))
        attempts = [{"event": "start", "attempt": 1, "chain": "a"}]
        if point.group in losses:
            loss = losses[point.group][sweep.seeds.index(point.seed)]
            kind, code = ("done", 0) if loss is not None else ("diverged", 3)
            attempts.append({"event": "end", "attempt": 1, "kind": kind, "code": code, "seconds": 2.0})
            if loss is not None:
                lines = [
                    {"step": step, "tokens": step * 512, "loss": value, "val/tiny/loss": value, "seconds": 1.0}
                    for step, value in ((10, loss + 1), (20, loss))
                ]
                (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
                (folder / "events.jsonl").write_text(json.dumps({"event": "end", "step": 20}) + "\n")
            (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
        states.append(read_state(point, point.name, folder, sweep.retries))
    return sweep, states


INNER = {
    "gamma0.5-lr0.001": [3.0, 3.0], "gamma0.5-lr0.002": [2.5, 2.7], "gamma0.5-lr0.004": [2.4, 3.4],
    "gamma1-lr0.001": [3.0, 3.0], "gamma1-lr0.002": [2.9, 2.9], "gamma1-lr0.004": [2.8, 2.8],
}  # fmt: skip


def test_the_best_is_that_of_the_mean_over_seeds(tmp_path: Path) -> None:
    """Of gamma 0.5 it lies inside; the value with the best single seed is not it. Of gamma 1 it lies at the edge."""
    sweep, states = states_of(tmp_path, INNER)
    best, warnings = best_values(sweep, states)
    assert best == {"gamma0.5": "gamma0.5-lr0.002", "gamma1": "gamma1-lr0.004"}
    (warning,) = warnings
    assert warning.startswith("gamma1: the best optimizer.lr, 0.004, lies at the upper edge of its grid")
    rows = {row["point"]: row for row in summary(sweep, states)}
    assert rows["gamma0.5-lr0.002"]["loss"] == pytest.approx(2.6)
    assert rows["gamma0.5-lr0.002"]["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert [name for name, row in rows.items() if row["best"]] == ["gamma0.5-lr0.002", "gamma1-lr0.004"]


def test_what_has_not_all_seeds_is_no_candidate(tmp_path: Path) -> None:
    losses = {**INNER, "gamma0.5-lr0.002": [0.1, None], "gamma1-lr0.004": [None, None]}
    del losses["gamma1-lr0.001"], losses["gamma1-lr0.002"]
    sweep, states = states_of(tmp_path, losses)
    best, warnings = best_values(sweep, states)
    assert best == {"gamma0.5": "gamma0.5-lr0.004"}
    assert "gamma1: no value of optimizer.lr has finished points of every seed" in warnings
    assert {row["point"].rpartition("-seed")[0] for row in rows_of(sweep, states) if row["is_best"]} == {
        "gamma0.5-lr0.004"
    }
    assert {row["point"]: row["seeds"] for row in summary(sweep, states)}["gamma0.5-lr0.002"] == "1/2, 1 diverged"
    assert [final_loss(state) for state in states if state.point.group == "gamma0.5-lr0.002"] == [0.1, None]


def test_every_validation_has_a_row(tmp_path: Path) -> None:
    sweep, states = states_of(tmp_path, {**INNER, "gamma1-lr0.001": [None, 3.0]})
    rows, folder = rows_of(sweep, states), SweepFolder(tmp_path / "state")
    write_table(folder, rows)
    table = parquet.read_table(folder.parquet_file).to_pylist()
    assert table == [{key: row.get(key) for key in table[0]} for row in rows]
    assert len(rows) == 11 * 2 + 1
    with open(folder.csv_file) as file:
        text = list(csv.DictReader(file))
    assert [row["point"] for row in text] == [row["point"] for row in rows]
    last = [row for row in rows if row["is_last"]]
    assert len(last) == 11 and {row["step"] for row in last} == {20}
    for row in last:
        assert row["flops"] == row["flops_per_token"] * row["tokens"]
        assert row["loss"] == INNER[row["point"].rpartition("-seed")[0]][row["seed"] - 1]
        assert row["is_best"] == (row["point"].rpartition("-seed")[0] in ("gamma0.5-lr0.002", "gamma1-lr0.004"))
        assert row["lr_tuned"] and row["gamma"] == row["init.gamma"] and row["code"] == "abc"
    (diverged,) = [row for row in rows if row["status"] == "diverged"]
    assert diverged["point"] == "gamma1-lr0.001-seed1" and diverged.get("loss") is None


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over seeds, of every arm at its best value, and over all values; nothing where nothing has ended."""
    sweep, states = states_of(tmp_path, INNER)
    folder, drawn = SweepFolder(tmp_path / "state"), []
    folder.path.mkdir()
    monkeypatch.setattr(collect, "save_figure", lambda figure, path: (drawn.append(figure), save_figure(figure, path)))
    draw(folder, sweep, states)
    assert folder.figure_file.read_bytes()[:4] == b"\x89PNG"
    curves, ends, rates = drawn[0].axes
    assert [line.get_label() for line in curves.get_lines()] == ["gamma0.5", "gamma1"]
    assert curves.get_lines()[0].get_ydata()[-1] == pytest.approx(2.6)
    assert [text.get_text() for text in ends.get_yticklabels()] == ["gamma0.5", "gamma1"]
    assert rates.get_lines()[0].get_ydata() == pytest.approx([3.0, 2.6, 2.9])
    assert [text.get_text() for text in rates.get_xticklabels()] == ["0.001", "0.002", "0.004"]
    folder.figure_file.unlink()
    draw(folder, sweep, [state for state in states if state.status != "done"])
    assert not folder.figure_file.exists()


@pytest.mark.parametrize(
    ("lines", "status", "failures"),
    [
        ([], "pending", 0),
        (["start"], "stopped", 0),
        (["start", "failed"], "failed", 1),
        # One chain of a supervisor is one failure, however often it started the run.
        (["start", "failed", "start", "failed", "start", "failed"], "failed", 1),
        (["start", "failed", "new", "start", "failed", "new", "start", "failed"], "given up", 3),
        (["start", "refused"], "given up", 1),
        (["start", "refused", "retry"], "stopped", 0),
        (["start", "failed", "start", "preempted"], "stopped", 0),
        (["start", "lost", "start"], "stopped", 0),
        (["start", "diverged"], "diverged", 0),
        (["start", "behind"], "behind", 0),
    ],
)  # fmt: skip
def test_states(tmp_path: Path, lines: list[str], status: str, failures: int) -> None:
    (point, *_) = expand(read_sweep(write(tmp_path)), tmp_path / "points")
    (tmp_path / "point.json").write_text(json.dumps({"hash": "x", "code": ""}))
    chain, text = 0, []
    for line in lines:
        chain += line == "new"
        if line == "start":
            text.append({"event": "start", "chain": str(chain)})
        elif line == "retry":
            text.append({"event": "retry"})
        elif line != "new":
            text.append({"event": "end", "kind": line, "code": 1, "seconds": 1.0})
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in text))
    state = read_state(point, "x", tmp_path, 2)
    assert (state.status, state.failures) == (status, failures)
