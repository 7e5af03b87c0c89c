"""Points: their length with a growing batch, what is read once, and the hash by which they are known again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import write

from megagamma.data.schedule import samples_before, total_steps
from megagamma.planning.flops import flops_per_token
from megagamma.scaling.folder import SweepFolder
from megagamma.scaling.plan import comparison_lines
from megagamma.scaling.points import Point, content_hash, data_identity, differing_options, expand
from megagamma.scaling.spec import read_sweep


def points(folder: Path, **changes: Any) -> list[Point]:
    return expand(read_sweep(write(folder, **{"axes": {}, "rules": {}, "seeds": [1], **changes})), Path("points"))


def branched(folder: Path, step: int, **changes: Any) -> Point:
    trunk = folder / "step_00000008"
    trunk.mkdir(exist_ok=True)
    (trunk / "checkpoint.json").write_text(json.dumps({"step": step}))
    (point,) = points(folder, **{**changes, "set": {**changes.get("set", {}), "run.branch_from": str(trunk)}})
    return point


RAMP = {"data.batch_ramp": [2, 2, 40]}


def test_tokens_and_flops_of_a_batch_that_grows(tmp_path: Path) -> None:
    """Step by step: 2, 4 and 6 samples, then 8. A branch has the rest of them."""
    (point,) = points(tmp_path, set=RAMP)
    data, step_flops = point.config.data, flops_per_token(point.sized.model, 64)
    samples, consumed = [], 0
    while len(samples) < 20:
        samples.append(min(8, 2 + 2 * (consumed * 4 // 40)))
        consumed += samples[-1]
    assert samples[0] == 2 and samples[-1] == 8
    assert point.steps == 20 and point.tokens == sum(samples) * 64 < 20 * 8 * 64
    assert point.flops == pytest.approx(step_flops * point.tokens, rel=1e-12)
    branch = branched(tmp_path, 8, set=RAMP)
    assert branch.tokens == point.tokens
    assert branch.flops == pytest.approx(step_flops * 64 * sum(samples[8:]), rel=1e-12)
    assert branched(tmp_path, 30, set=RAMP).flops == 0.0
    assert samples_before(data, 8) == sum(samples[:8])


def test_rules_see_the_tokens_of_a_batch_that_grows(tmp_path: Path) -> None:
    rule = {"rule": "power", "of": "tokens", "at": 64, "value": 1, "exponent": 1}
    (point,) = points(tmp_path, set=RAMP, rules={"schedule.warmup_steps": rule})
    assert point.config.schedule.warmup_steps == point.tokens / 64
    # The base's batch may be too small for the ramp that is meant for the rule's.
    rules = {"data.global_batch_size": {"rule": "constant", "value": 32}}
    (point,) = points(tmp_path, set={"data.batch_ramp": [16, 8, 64]}, rules=rules)
    assert point.tokens < 20 * 32 * 64


def test_the_trunk_is_read_once(tmp_path: Path) -> None:
    """A progress line asks every point for its FLOPs."""
    point = branched(tmp_path, 8)
    before = point.flops
    (tmp_path / "step_00000008" / "checkpoint.json").unlink()
    assert (point.flops, point.first_step) == (before, 8)
    assert branched(tmp_path, 4).flops > before


def test_numbers_of_one_value_have_one_hash(tmp_path: Path) -> None:
    whole, point = (
        points(tmp_path, set={"optimizer.clip_grad": value, "run.tokens": 5120 * value})[0] for value in (1, 1.0)
    )
    assert (type(whole.config.run.tokens), type(point.config.run.tokens)) == (int, float)
    assert total_steps(whole.config) == total_steps(point.config)
    assert content_hash(whole.config, []) == content_hash(point.config, [])
    assert content_hash(whole.config, [], as_given=True) != content_hash(point.config, [], as_given=True)
    for name, values in (("exponents", {"query": 1}), ("gamma", 1)):
        setattr(whole.config.init, name, values)
        setattr(point.config.init, name, {"query": 1.0} if isinstance(values, dict) else 1.0)
        assert content_hash(whole.config, []) == content_hash(point.config, []), name
    whole.config.optimizer.betas = (0, 0.95)
    point.config.optimizer.betas = (0.0, 0.95)
    assert content_hash(whole.config, []) == content_hash(point.config, [])
    whole.config.optimizer.betas = (0.1, 0.95)
    assert content_hash(whole.config, []) != content_hash(point.config, [])


def test_ordinary_points_keep_the_hash_of_earlier_versions(tmp_path: Path) -> None:
    """Where every number is given in the type of its option: another hash would run finished points again."""
    for point in expand(read_sweep("configs/sweeps/smoke.yaml"), Path("points")):
        assert content_hash(point.config, ["x"]) == content_hash(point.config, ["x"], as_given=True)
    given = {"precision.dtype": "auto", "run.compile": "auto"}
    # As it was before options were added; when this fails, name the new option in `points._ADDED`.
    point = expand(read_sweep(write(tmp_path, set=given, rules={})), Path("points"))[0]
    assert content_hash(point.config, ["x"]).startswith("e1057e32d2e80c2a")
    point.config.run.compile = "on"
    assert not content_hash(point.config, ["x"]).startswith("e1057e32d2e80c2a"), "it moves numbers by rounding"


def test_finished_points_of_earlier_versions_are_recognised(tmp_path: Path, data_cache: str) -> None:
    (point,) = points(tmp_path, set={"optimizer.clip_grad": 1, "data.cache": data_cache})
    folder = SweepFolder(tmp_path / "state")
    (state,) = folder.states([point], 0)
    earlier = content_hash(point.config, data_identity(point.config), as_given=True)
    assert state.hash != earlier
    place = folder.points / "anything"
    place.mkdir(parents=True)
    (place / "point.json").write_text(json.dumps({"hash": earlier}))
    (state,) = folder.states([point], 0)
    assert (state.hash, state.folder) == (earlier, place)
    # One that this version began comes first.
    (folder.points / "new").mkdir()
    (folder.points / "new" / "point.json").write_text(
        json.dumps({"hash": content_hash(point.config, data_identity(point.config))})
    )
    assert folder.states([point], 0)[0].folder == folder.points / "new"


def test_what_arms_differ_in_names_how_they_are_started(tmp_path: Path) -> None:
    axes = {
        "arm": {"a": {}, "b": {"init.gamma": 0.5}},
        "ranks": {"one": {}, "two": {"guard.max_skips": 9, "launch": {"processes": 2}}},
    }
    sweep = read_sweep(write(tmp_path, axes=axes, rules={}, seeds=[1], arms=["arm", "ranks"]))
    found = expand(sweep, Path("points"))
    assert differing_options(found[0], found[1]) == ["guard.max_skips", "launch.processes"]
    lines, warnings = comparison_lines(sweep, found)
    assert "differ in guard.max_skips, init.gamma, launch.processes;" in lines[0] and not warnings
