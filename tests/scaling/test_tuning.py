"""Tuned axes, from points whose files are written here: the best value, edges of the grid, and who is ended for whose sake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import write

from megagamma.scaling.collect import rows_of
from megagamma.scaling.folder import PointState, read_state
from megagamma.scaling.grid import StopLost, Sweep
from megagamma.scaling.points import expand
from megagamma.scaling.spec import read_sweep
from megagamma.scaling.tuning import best_values, final_loss, is_lost, last_loss, learning_rate_line

LRS = [0.004, 0.001, 0.002, 0.008]  # in no order
Endings = dict[str, list[float | str]]


def states_of(folder: Path, endings: Endings, **changes: Any) -> tuple[Sweep, list[PointState]]:
    """A sweep and its points' states, by name without seed: the final loss of each seed, or how the last attempt ended."""
    axes = {"optimizer.lr": {"values": LRS, "tuned": True}}
    sweep = read_sweep(write(folder, **{"axes": axes, "rules": {}, **changes}))
    states = []
    for point in expand(sweep, folder / "points"):
        state = PointState(point, point.name, Path(point.config.run.folder), "pending")
        ending = endings.get(point.group, ["pending"] * len(sweep.seeds))[sweep.seeds.index(point.seed)]
        if isinstance(ending, str):
            state.status = ending
        else:
            state.status, state.step = "done", point.steps
            state.metrics = [{"step": point.steps, "tokens": point.tokens, "loss": 0.0, "val/tiny/loss": ending}]
        states.append(state)
    return sweep, states


# Endings of 0.001, 0.002, 0.004 and 0.008, of both seeds where they are one.
BEST_IS_THIRD = (3.0, 2.5, 2.0)
EDGES: list[tuple[str, tuple[Any, ...], str, list[str]]] = [
    ("inside of the sorted values, first of the file", (3.0, 2.5, 2.0, 4.0), "lr0.004", []),
    ("at an edge of the sorted values, inside of the file", (2.0, 2.1, 2.5, 3.0),
     "lr0.001", ["0.001, lies at the lower edge of its grid: the optimum may lie beyond"]),
    ("at an edge of the sorted values", (3.0, 2.9, 2.5, 2.0),
     "lr0.008", ["0.008, lies at the upper edge of its grid: the optimum may lie beyond"]),
    ("the edge is not finished", (*BEST_IS_THIRD, ["given up", 1.0]),
     "lr0.004", ["without finished points of every seed: optimizer.lr 0.008 (given up in seed 1): the best is one of the",
                 "0.004, lies at the upper edge of its grid (of the values with a result: lr0.001, lr0.002, lr0.004)"]),
    ("nothing is known of the edge", BEST_IS_THIRD,
     "lr0.004", ["optimizer.lr 0.008 (pending): the best", "upper edge of its grid (of the values with a result"]),
    ("the edge is behind", (*BEST_IS_THIRD, "behind"), "lr0.004", []),
    ("the edge is behind in one seed, worse in the other", (*BEST_IS_THIRD, ["behind", 2.1]), "lr0.004", []),
    ("the edge is behind in one seed, better in the other", (*BEST_IS_THIRD, ["behind", 1.9]),
     "lr0.004", ["optimizer.lr 0.008 (behind in seed 1): the best is one of", "upper edge of its grid (of the values"]),
    ("the edge diverged", (*BEST_IS_THIRD, ["diverged", 1.0]), "lr0.004", []),
    ("the edge ended with a loss that is none", (*BEST_IS_THIRD, [float("nan"), 1.0]), "lr0.004", []),
    ("one value", (3.0,),
     "lr0.001", ["0.004 (pending), 0.002 (pending), 0.008 (pending): the best", "is the only one with a result"]),
]  # fmt: skip


@pytest.mark.parametrize(("endings", "best", "messages"), [case[1:] for case in EDGES], ids=[case[0] for case in EDGES])
def test_edges(tmp_path: Path, endings: tuple[Any, ...], best: str, messages: list[str]) -> None:
    by_name = {
        f"lr{lr}": end if isinstance(end, list) else [end] * 2 for lr, end in zip(sorted(LRS), endings, strict=False)
    }
    sweep, states = states_of(tmp_path, by_name)
    found, warnings = best_values(sweep, states)
    assert found == {"point": best}
    assert len(warnings) == len(messages), warnings
    for warning, message in zip(warnings, messages, strict=True):
        assert warning.startswith("point: ") and message in warning


def test_the_edge_of_one_axis_is_seen_at_the_best_of_the_other(tmp_path: Path) -> None:
    """Names have no edges. 0.001 was tried with the other shape only, which says nothing of this one."""
    axes = {
        "optimizer.lr": {"values": [0.002, 0.001, 0.004], "tuned": True},
        "schedule.shape": {"values": ["cosine", "linear"], "tuned": True},
    }
    endings: Endings = {f"lr{lr}-shape{shape}": [3.0] for lr in (0.001, 0.002, 0.004) for shape in ("cosine", "linear")}
    endings["lr0.002-shapelinear"] = [2.0]
    assert best_values(*states_of(tmp_path, endings, axes=axes, seeds=[1])) == ({"point": "lr0.002-shapelinear"}, [])
    excluded = [{"optimizer.lr": 0.001, "schedule.shape": "linear"}]
    found, (warning,) = best_values(*states_of(tmp_path, endings, axes=axes, seeds=[1], exclude=excluded))
    assert (
        found == {"point": "lr0.002-shapelinear"} and "the best optimizer.lr, 0.002, lies at the lower edge" in warning
    )


def test_an_arm_whose_learning_rate_was_not_tuned_is_named(tmp_path: Path) -> None:
    axes = {"init.gamma": [0.5, 1.0], "optimizer.lr": {"values": [0.001, 0.002], "tuned": True}}
    sweep, states = states_of(tmp_path, {}, axes=axes, exclude=[{"init.gamma": 1.0, "optimizer.lr": 0.002}])
    line = learning_rate_line(sweep, [state.point for state in states])
    assert line.startswith(
        "learning rate: tuned per arm and size over the values 0.001, 0.002; untuned, with one value, in gamma1:"
    )
    tuned = {row["init.gamma"]: row["lr_tuned"] for row in rows_of(sweep, states)}
    assert tuned == {0.5: True, 1.0: False}
    # Without the exclusion all are; a tuned axis of another option tunes none.
    sweep, states = states_of(tmp_path, {}, axes=axes)
    assert "untuned" not in learning_rate_line(sweep, [state.point for state in states])
    axes["optimizer.eps"] = {**axes.pop("optimizer.lr"), "values": [1e-8, 1e-7]}
    sweep, states = states_of(tmp_path, {}, axes=axes)
    assert learning_rate_line(sweep, [state.point for state in states]).startswith("learning rate: untuned")
    assert not any(row["lr_tuned"] for row in rows_of(sweep, states))


def test_a_loss_that_is_not_finite_is_none(tmp_path: Path) -> None:
    """As a point's file has it: null. The validation before is not its result."""
    _, (state, *_) = states_of(tmp_path, {})
    state.folder.mkdir(parents=True)
    (state.folder / "point.json").write_text("{}")
    lines = [{"step": 10, "loss": 3.0, "val/tiny/loss": 2.0}, {"step": 15, "loss": 4.0}, {"step": 20, "loss": 3.0}]
    for last, expected in ((1.5, 1.5), (None, None)):
        lines[2]["val/tiny/loss"] = last
        (state.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (state.folder / "events.jsonl").write_text(json.dumps({"event": "end", "step": 20}) + "\n")
        read = read_state(state.point, state.hash, state.folder, 2)
        assert final_loss(read) == last_loss(read.metrics) == expected
        assert final_loss(replace(read, status="running")) is None
    assert last_loss([{"step": 1, "loss": 3.0}]) == 3.0 and last_loss([]) is None


# The points are 20 steps of 512 tokens long. Tokens of each validation with its loss.
HALF, NEARLY, END = 10 * 512, 15 * 512, 20 * 512
RULE = StopLost(after=0.5, margin=0.2)
OTHER = {HALF: 2.0, NEARLY: 1.9, END: 1.8}
LOST: list[tuple[str, dict[int, float | None], dict[int, float | None], dict[str, Any], bool]] = [
    ("behind", {HALF: 2.5}, OTHER, {}, True),
    ("within the margin", {HALF: 2.1}, OTHER, {}, False),
    ("behind before, not at the last both have", {HALF: 2.5, NEARLY: 1.9}, OTHER, {}, False),
    ("the other has not come as far", {HALF: 2.5, NEARLY: 2.4}, {HALF: 2.0}, {}, True),
    ("before the share of the run", {HALF - 512: 2.5}, {HALF - 512: 1.0}, {}, False),
    ("both have one before the share only", {HALF - 512: 2.5, HALF: 2.5}, {HALF - 512: 1.0, NEARLY: 1.0}, {}, False),
    ("never at equal tokens", {HALF: 2.5}, {HALF + 256: 1.0}, {}, False),
    ("the other diverged", {HALF: 2.5}, OTHER, {"status": "diverged"}, False),
    ("the other's validation is not finite", {HALF: 2.5}, {**OTHER, NEARLY: None}, {}, False),
    ("the other's training is not finite now", {HALF: 2.5}, OTHER, {"loss": None}, False),
    ("another seed", {HALF: 2.5}, OTHER, {"seed": 2}, False),
    ("own loss is not finite", {HALF: None}, OTHER, {}, False),
]  # fmt: skip


def lines_of(losses: dict[int, float | None], loss: float | None = 1.0, batch: int = 512) -> list[dict[str, Any]]:
    lines = [{"step": t // batch, "tokens": t, "loss": 1.0, "val/tiny/loss": value} for t, value in losses.items()]
    return [*lines, {"step": max(losses) // batch + 1, "tokens": max(losses) + batch, "loss": loss}]


@pytest.mark.parametrize(
    ("own", "other", "more", "expected"), [case[1:] for case in LOST], ids=[case[0] for case in LOST]
)
def test_who_is_lost(
    tmp_path: Path, own: dict[int, float | None], other: dict[int, float | None], more: dict[str, Any], expected: bool
) -> None:
    _, states = states_of(tmp_path, {})
    seed = more.get("seed", 1)
    state = next(one for one in states if one.point.name == "lr0.004-seed1")
    leader = next(one for one in states if one.point.name == f"lr0.001-seed{seed}")
    assert state.point.tokens == END
    state.status, state.metrics, state.step = "running", lines_of(own), max(own) // 512 + 1
    leader.status, leader.metrics = more.get("status", "running"), lines_of(other, more.get("loss", 1.0))
    assert is_lost(state, states, RULE) is expected
    # A training loss is no ground.
    for one in (state, leader):
        one.metrics = [{key: line[key] for key in ("step", "tokens", "loss")} for line in one.metrics]
    leader.metrics = [{**line, "loss": 0.1} for line in leader.metrics]
    assert not is_lost(state, states, RULE)


def test_batch_sizes_are_compared_at_equal_tokens(tmp_path: Path) -> None:
    """Of a tuned batch size equal steps are other tokens: there the smaller batch would be behind, and is not."""
    axes = {"data.global_batch_size": {"values": [8, 16], "tuned": True}}
    _, (small, large) = states_of(tmp_path, {}, axes=axes, seeds=[1], set={"run.tokens": END})
    small.metrics, large.metrics = lines_of({HALF: 2.5}), lines_of({HALF: 2.5, END: 2.0}, batch=1024)
    assert small.metrics[0]["step"] == 10 == large.metrics[1]["step"]
    assert not is_lost(small, [small, large], RULE)
    large.metrics[0]["val/tiny/loss"] = 2.0
    assert is_lost(small, [small, large], RULE)
