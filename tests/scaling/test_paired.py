"""Paired differences against numbers worked out by hand, and against unpaired ones."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.sweeps import write

from megagamma.scaling import paired
from megagamma.scaling.paired import interval, paired_differences, paired_lines
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
