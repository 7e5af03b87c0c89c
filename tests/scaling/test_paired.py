"""Paired differences against numbers worked out by hand, and against unpaired ones."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.sweeps import write

from megagamma.scaling import paired
from megagamma.scaling.paired import interval, paired_differences, paired_lines, score_differences
from megagamma.scaling.points import expand
from megagamma.scaling.spec import read_sweep


def test_interval() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and high - 3.0 == pytest.approx(2.776 * math.sqrt(2.5 / 5)) and 3.0 - low == high - 3.0
    assert math.isnan(interval([1.0])[1])
    assert interval([0.0, 1.0] * 50)[2] > 0.5 + 1.96 * 0.5 / 10, "many values: on the safe side"


def test_what_seeds_share_cancels(tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, set={"data.cache": data_cache}, rules={})
    sweep = read_sweep(path)
    states = [SimpleNamespace(point=point) for point in expand(sweep, tmp_path)]

    def loss(state: SimpleNamespace) -> float | None:
        point = state.point
        if point.seed == 3:
            return None  # did not finish
        return 4.0 + point.seed - 0.1 * (point.labels["init.gamma"] == "gamma1") + 0.001 * point.seed

    monkeypatch.setattr(paired, "final_loss", loss)
    rows = [row for row in paired_differences(sweep, states) if row["axis"] == "init.gamma"]  # type: ignore[arg-type]
    assert rows and all(row["mean"] == pytest.approx(-0.1) for row in rows)
    assert all(row["high"] - row["low"] < 1e-9 for row in rows), "seeds differ by 1, the differences do not"
    assert "minus" in paired_lines(rows)[0] and "-0.1000 nats" in paired_lines(rows)[0]
    # Negative control: a seed that is of one arm only is left out.
    monkeypatch.setattr(paired, "final_loss", lambda state: loss(state) if state.point.seed == 1 else None)
    assert paired_differences(sweep, states) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "pairs"), [(4, 6), (5, 4)])
def test_many_values_are_compared_with_the_first(
    tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch, count: int, pairs: int
) -> None:
    gammas = [0.5, 0.6, 0.7, 0.8, 0.9][:count]
    sweep = read_sweep(
        write(tmp_path, set={"data.cache": data_cache}, rules={}, axes={"init.gamma": gammas}, seeds=[1, 2])
    )
    states = [SimpleNamespace(point=point) for point in expand(sweep, tmp_path)]
    monkeypatch.setattr(paired, "final_loss", lambda state: state.point.config.init.gamma)
    rows = paired_differences(sweep, states)  # type: ignore[arg-type]
    assert len(rows) == pairs
    of_first = {row["second"]: row["mean"] for row in rows if row["first"] == "gamma0.5"}
    assert of_first == {f"gamma{gamma:g}": pytest.approx(gamma - 0.5) for gamma in gammas[1:]}


def test_of_a_tuned_axis_the_best_of_each_arm_counts(
    tmp_path: Path, data_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"init.gamma": [0.5, 1.0], "optimizer.lr": {"values": [0.001, 0.002], "tuned": True}}
    sweep = read_sweep(write(tmp_path, set={"data.cache": data_cache}, rules={}, axes=axes, seeds=[1, 2]))

    def state(point: Any) -> SimpleNamespace:
        # Gamma 0.5 is best at 0.001 with 4.0, gamma 1 at 0.002 with 3.8; at one rate they differ by 1.
        small, fast = point.config.init.gamma == 1, point.config.optimizer.lr == 0.002
        loss = (3.8 if fast else 5.0) if small else (4.8 if fast else 4.0)
        line = {"step": point.steps, "tokens": 1, "val/text/loss": loss + point.seed + 0.01 * point.seed * small}
        return SimpleNamespace(point=point, status="done", metrics=[line], folder=tmp_path / point.name)

    states = [state(point) for point in expand(sweep, tmp_path)]
    (row,) = paired_differences(sweep, states)  # type: ignore[arg-type]
    assert row["mean"] == pytest.approx(-0.2 + 0.015) and row["others"] == "" and row["seeds"] == 2

    # Scores of the same points: of each arm those of its best rate.
    scores = [
        {"run": one.point.name, "task": "arc_easy", "metric": "choice_prob", "value": value + 0.1 * one.point.seed}
        for one in states
        for value in [1.0 if one.point.config.optimizer.lr == 0.002 else 0.25]
    ]
    monkeypatch.setattr(paired, "final_loss", lambda state: pytest.fail("a score is no loss"))
    (row,) = score_differences(sweep, states, [*scores, scores[0] | {"task": "other"}])  # type: ignore[arg-type]
    assert row["mean"] == pytest.approx(0.75) and (row["task"], row["metric"]) == ("arc_easy", "choice_prob")
    assert "+0.7500 choice_prob, 95 % interval" in paired_lines([row], row["metric"])[0]
