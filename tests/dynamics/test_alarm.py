"""The alarm by updates: one size for every layout, and a jump that is seen before the loss shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import SHAPE
from support.ranks import RankPool

from megagamma.config.schema import DynamicsConfig
from megagamma.dynamics.alarm import UpdateAlarm


def kicked(arguments: list[str], at: int, factor: float) -> int:
    """A run in which Adam's first moments are made larger after a step."""
    from support.train import SMOKE

    from megagamma.config.io import parse_config
    from megagamma.environment import world_from_environment
    from megagamma.job import train
    from megagamma.training.callbacks.base import Callback, Step

    class Kick(Callback):
        def before_update(self, step: Step) -> bool:
            if step.number == at:
                for flat in self.engine.state.flat_parameters():
                    self.engine.state.adam.state[flat]["exp_avg"].mul_(factor)
            return True

    world = world_from_environment()
    return train(parse_config([*SMOKE, *arguments], world_size=world.size), world, measuring=[Kick()])


def options(folder: Path, cache: str, *more: str) -> list[str]:
    every = ["--dynamics.alarm_interval", "1", "--run.steps", "24", "--schedule.shape", "constant"]
    return [*SHAPE, "--run.folder", str(folder), "--data.cache", cache, *every, *more]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_jump_is_reported_and_named(
    tmp_path: Path, four_ranks: RankPool, one_rank: RankPool, data_cache: str
) -> None:
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2"]
    zero = ["--deepspeed_config", "configs/deepspeed/zero1.json"]
    assert four_ranks.run(kicked, options(tmp_path / "four", data_cache, *layout, *zero), 22, 20.0) == [0] * 4
    assert one_rank.run(kicked, options(tmp_path / "one", data_cache), 22, 1.0) == [0]
    alarms = [line for line in lines(tmp_path / "four" / "events.jsonl") if line["event"] == "update_alarm"]
    assert alarms and alarms[0]["step"] == 22 and alarms[0]["update_over_lr"] > 3 * alarms[0]["recent_mean"]
    assert {"query", "mlp_down", "embedding"} <= set(alarms[0]["update_over_drawn_std"])
    # The control: nothing was done to this run. Before the kick both have one size, whatever the layout.
    assert "update_alarm" not in {line["event"] for line in lines(tmp_path / "one" / "events.jsonl")}
    first, second = (
        [line["update_over_lr"] for line in lines(tmp_path / name / "metrics.jsonl")[:10]] for name in ("four", "one")
    )
    assert first == pytest.approx(second, rel=0.01)
    assert 0.5 < first[0] <= 1, "Adam's first step moves by the learning rate every weight that had a gradient"


def test_what_is_far() -> None:
    alarm = UpdateAlarm(DynamicsConfig())
    values = 0.3 + 0.01 * torch.randn(80, generator=torch.Generator().manual_seed(0))
    for count, value in enumerate(values.tolist()):
        assert not alarm.is_far(value), count
        assert alarm.is_far(0.6) == (count >= 16)
        alarm.recent.append(value)
    assert len(alarm.recent) == 64
    steady = UpdateAlarm(DynamicsConfig())
    steady.load_state([0.3] * 20)
    assert not steady.is_far(0.33) and steady.is_far(0.36)
    for wrong in ({"a": 1}, ["x"], None, [math.nan, "y"]):
        other = UpdateAlarm(DynamicsConfig())
        other.load_state(wrong)
        assert not other.recent
