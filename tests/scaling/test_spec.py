"""Sweep files: what is in them, and what is refused with which message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.sweeps import GOOD, write

from megagamma.errors import ConfigurationError
from megagamma.scaling.grid import COLUMNS
from megagamma.scaling.points import content_hash, expand
from megagamma.scaling.spec import read_sweep


def points(folder: Path, **changes: Any) -> list[Any]:
    return expand(read_sweep(write(folder, **changes)), Path("points"))


def test_the_grid_and_its_rules(tmp_path: Path) -> None:
    found = points(tmp_path, exclude=[{"size": "d32", "init.gamma": 0.5}])
    assert [point.name for point in found] == [
        f"{arm}-seed{seed}" for arm in ("d32-gamma1", "d64-gamma0.5", "d64-gamma1") for seed in (1, 2)
    ]
    first, last = found[0].config, found[-1].config
    assert (first.model.hidden_size, first.model.head_dim, first.init.gamma, first.run.seed) == (32, 8, 1.0, 1)
    assert first.optimizer.lr == pytest.approx(0.004 * 0.5**-0.5, rel=1e-11)
    assert last.optimizer.lr == 0.004
    assert (last.run.folder, last.logging.wandb_group) == ("points/d64-gamma1-seed2", "study")
    assert sorted(found[0].config.model.__dict__) == sorted(last.model.__dict__)


def test_lengths_factors_and_arms(tmp_path: Path) -> None:
    rules = {
        "run.tokens": {"rule": "per_parameter", "tokens": 0.1, "of": "non_embedding"},
        "data.global_batch_size": {"rule": "table", "of": "size", "values": {"d32": 4, "d64": 8}},
        "schedule.warmup_steps": {"rule": "power", "of": "tokens", "at": 1e4, "value": 7, "exponent": 1},
        "optimizer.lr": {"rule": "constant", "value": 0.002, "arms": {"init.gamma": {1.0: {"value": 0.004}}}},
    }
    axes = {**GOOD["axes"], "optimizer.lr": {"factors": [0.5, 2], "tuned": True}}
    found = {point.name: point for point in points(tmp_path, rules=rules, axes=axes, seeds=[1])}
    assert len(found) == 8
    small = found["d32-gamma0.5-lrx0.5-seed1"]
    assert small.config.optimizer.lr == 0.001 and small.values["optimizer.lr"] == 0.001
    assert found["d32-gamma1-lrx2-seed1"].config.optimizer.lr == 0.008
    assert small.config.run.steps is None and small.config.data.global_batch_size == 4
    tokens = small.steps * 4 * 64
    assert small.tokens == tokens and 0 <= tokens - small.config.run.tokens < 4 * 64
    assert small.config.schedule.warmup_steps == round(7 * tokens / 1e4)
    assert small.comparison == "d32-gamma0.5" == found["d32-gamma0.5-lrx2-seed1"].comparison


def test_budgets_pick_tokens(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path), budgets=(1e10, 4e10))
    found = expand(sweep, Path("points"))
    assert len(found) == 16
    for point in found:
        step = point.flops / point.steps
        assert 0 <= point.flops - point.values["budget"] < step


REFUSED = [
    ({"axis": {}}, "axis is not a key of a sweep: use axes"),
    ({"name": "a/b"}, "name='a/b' must be letters"),
    ({"config": "configs/none.yaml"}, "there is no such file"),
    ({"axes": {"init.gama": [1]}}, "unknown axis: init.gama is not an option: did you mean init.gamma?"),
    ({"axes": {"init.gamma": []}}, "makes an empty grid"),
    ({"axes": {"init.gamma": [1.0, 1.0]}}, "gamma1 is there twice"),
    ({"axes": {"init.gamma": 1.0}}, "must be a list of values"),
    ({"axes": {"size": {"d1": {"model.hidden": 1}}}}, "model.hidden is not an option: did you mean model.hidden_size?"),
    ({"axes": {"a": {"x": {"init.gamma": 1}}, "init.gamma": [0.5]}}, "axes a and init.gamma both set init.gamma: two axes"),
    ({"axes": {"optimizer.lr": [0.1]}}, "rules.optimizer.lr and axis optimizer.lr both set optimizer.lr"),
    ({"axes": {"run.steps": {"factors": [1]}}}, "give rules.run.steps, or values"),
    ({"axes": {"run.seed": [1]}}, "run.seed: is given by the sweep itself"),
    ({"set": {"optimizer.lr": 1}}, "set.optimizer.lr and rules.optimizer.lr both set"),
    ({"seeds": [1, 1]}, "seeds=[1, 1]: one is there twice"),
    ({"seeds": ["a"]}, "must be whole numbers"),
    ({"rules": {"optimizer.lr": {"rule": "powr"}}}, "rule=powr: use power"),
    ({"rules": {"optimizer.lr": {"rule": "power", "of": "width"}}}, "power needs of, at, value, exponent; at is missing"),
    ({"rules": {"optimizer.lr": {"rule": "constant", "value": "high"}}}, "value=high must be a number"),
    ({"exclude": [{"sise": "d32"}]}, "exclude: sise is not an axis: use size, init.gamma"),
    ({"exclude": [{"size": "d33"}]}, "size=d33 is no value of that axis: use ['d32', 'd64']"),
    ({"exclude": [{"size": "d32"}, {"size": "d64"}]}, "has no points: exclude leaves none"),
    ({"arms": ["gamma"]}, "arms: gamma is not an axis"),
    ({"budgets": [0]}, "must be FLOPs"),
    ({"set": {"run.steps": 3}, "axes": {"run.tokens": [1000]}}, "axis run.tokens sets run.tokens, and set run.steps: both are"),
    ({"rules": {one: {"rule": "constant", "value": 9} for one in ("run.steps", "run.tokens")}}, "both are the length of a run"),
    ({"budgets": [1e9], "set": {"run.steps": 3}}, "budgets and run.steps both set the length"),
    ({"launch": {"processes": 3, "nodes": 2}}, "launch.nodes=2 must divide launch.processes=3"),
    ({"launch": {"procs": 3}}, "must have processes, nodes or time"),
    ({"retries": -1}, "retries=-1"),
    ({"stop_lost": {"after": 2, "margin": 1}}, "after must lie between 0 and 1"),
    ({"axes": {"size": {"d30": {"model.hidden_size": 30}}}}, "point d30: model.num_attention_heads=4 must divide"),
    ({"axes": {"logging.wandb_project": ["a", "b"]}}, "differ in nothing"),
    ({"launch": {"processes": 3}}, "data.global_batch_size=8 must be a multiple of"),
    ({"set": {"init.gamma": 9}, "axes": {}}, "init.gamma=9"),
    ({"seeds": []}, "seeds has none: a sweep without seeds has no points"),
    ({"seeds": [2**63]}, "seeds=[9223372036854775808] must be whole numbers of 0 or more, and at most 9223372036854775807"),
    ({"axes": {"size": {"a": {"file": ["x.yaml"]}}}}, "axes.size.a: file=['x.yaml'] must be the path of one config file"),
    ({"axes": {"size": {"a": {"file": None}}}}, "axes.size.a: file=None must be the path of one config file"),
    ({"axes": {"optimizer.lr.x": [1]}}, "optimizer.lr.x is not an option: optimizer.lr has no entries: set optimizer.lr"),
    ({"set": {"init.gamma.x": 1}}, "set: init.gamma.x is not an option: init.gamma has no entries: set init.gamma itself"),
    ({"set": {"optimizer.lr_factors.": 1}}, "optimizer.lr_factors. is not an option"),
    ({"set": {"model": {"qk_norm": True}, "model.qk_norm": False}}, "set: model.qk_norm is given twice"),
    ({"budgets": [1e9, 1e9]}, "axes.budget: 1e09 is there twice"),
    ({"exclude": [{"budget": 1e9}]}, "exclude: budget is not an axis"),
    ({"budgets": [1e9], "exclude": [{"budget": 2e9}]}, "budget=2000000000.0 is no value of that axis: use [1000000000.0]"),
    ({"axes": {"budget": {"a": {}, "b": {"init.gamma": 0.5}}}}, "axes.budget: is the name of the axis of the budgets"),
    ({"axes": {"a": {"x": {}, "x-y": {"init.gamma": 0.5}}, "b": {"y-z": {}, "z": {"optimizer.eps": 1.0e-7}}}},
     "points a=x x b=y-z and a=x-y x b=z are both named x-y-z: rename a label"),
    ({"axes": {"size": {"d32": {"launch": {"nodes": 3}}}}, "launch": {"processes": 4}},
     "point d32: launch.nodes=3 must divide launch.processes=4: use 1, 2 or 4"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_bad_sweeps_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        points(tmp_path, **changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", COLUMNS)
def test_an_axis_may_not_be_named_as_a_column_of_the_table(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"axes\.{name}: the table has a column {name} of its own"):
        read_sweep(write(tmp_path, axes={name: {"a": {}, "b": {"init.gamma": 0.5}}}))


def test_a_file_keeps_what_its_arm_does_not_set(tmp_path: Path) -> None:
    """Option by option, also where both give a section, or one of them dotted names."""
    (tmp_path / "arm.yaml").write_text(
        "model: {hidden_size: 32, num_layers: 3, ffn_hidden_size: 64}\ninit.query: 0.5\n"
    )
    arms = {
        "file": "arm.yaml",
        "section": {"file": "arm.yaml", "model": {"num_layers": 2}, "init": {"key": 0.7}},
        "dotted": {"file": "arm.yaml", "model.num_layers": 5, "init.query": 0.9},
    }
    found = {point.group: point.config for point in points(tmp_path, axes={"size": arms}, seeds=[1])}
    shapes = {name: (c.model.hidden_size, c.model.num_layers, c.model.ffn_hidden_size) for name, c in found.items()}
    assert shapes == {"file": (32, 3, 64), "section": (32, 2, 64), "dotted": (32, 5, 64)}
    assert found["section"].init.exponents == {"query": 0.5, "key": 0.7}
    assert found["dotted"].init.exponents == {"query": 0.9}


def test_nodes_and_processes_are_checked_together(tmp_path: Path) -> None:
    """Those of an arm and of the sweep are one launch: neither alone has to divide."""
    axes = {"size": {"d32": {"launch": {"nodes": 2}}}}
    (point,) = points(tmp_path, axes=axes, launch={"processes": 4}, seeds=[1])
    assert (point.launch.processes, point.launch.nodes) == (4, 2)


def test_a_budget_may_be_excluded(tmp_path: Path) -> None:
    excluded = [{"budget": 4e10, "size": "d32"}]
    found = points(tmp_path, budgets=[1e10, 4e10], exclude=excluded, seeds=[1], rules={})
    assert [point.group for point in found if point.config.init.gamma == 1] == [
        "d32-gamma1-1e10", "d64-gamma1-1e10", "d64-gamma1-4e10",
    ]  # fmt: skip


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no such sweep: use configs/sweeps/"):
        read_sweep("configs/sweeps/none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigurationError, match="must be a mapping"):
        read_sweep(tmp_path / "list.yaml")


def test_the_hash_is_of_what_the_numbers_depend_on(tmp_path: Path) -> None:
    """Names, places and threads do not count; any option of the model, the data's content, and the seed do."""
    (point, *_) = points(tmp_path)
    digest = content_hash(point.config, ["data"])
    for section, key, value in (
        ("run", "name", "x"), ("run", "folder", "x"), ("run", "threads", 3), ("data", "cache", "x"),
        ("logging", "wandb", "online"),
    ):  # fmt: skip
        setattr(getattr(point.config, section), key, value)
        assert content_hash(point.config, ["data"]) == digest, key
    assert content_hash(point.config, ["other data"]) != digest
    for section, key, value in (
        ("run", "seed", 9),
        ("optimizer", "lr", 0.5),
        ("init", "gamma", 0.7),
        ("guard", "on_nan", "skip"),
    ):
        before = getattr(getattr(point.config, section), key)
        setattr(getattr(point.config, section), key, value)
        assert content_hash(point.config, ["data"]) != digest, key
        setattr(getattr(point.config, section), key, before)
    assert content_hash(point.config, ["data"]) == digest
