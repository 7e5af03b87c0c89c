"""Rules: the order in which they are applied, arguments of single arms, whole numbers; and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.sweeps import GOOD, write

from megagamma.errors import ConfigurationError
from megagamma.scaling.options import is_mapping, is_whole, option_types
from megagamma.scaling.points import Point, expand
from megagamma.scaling.spec import read_sweep

BATCH_OF_TOKENS = {"rule": "power", "of": "tokens", "at": 1e5, "value": 8, "exponent": 0.5, "multiple_of": 4}
LENGTHS = {"rule": "table", "of": "size", "values": {"d32": 1e5, "d64": 4e5}}


def points(folder: Path, **changes: Any) -> list[Point]:
    return expand(read_sweep(write(folder, **changes)), Path("points"))


def only(folder: Path, **changes: Any) -> Point:
    (point,) = points(folder, **{"axes": {}, "seeds": [1], "rules": {}, **changes})
    return point


def test_a_batch_that_is_a_function_of_the_tokens_sees_those_of_the_run(tmp_path: Path) -> None:
    """Not those of the config that the sweep starts from, which are 20 steps of 8 x 64; steps follow from both."""
    rules = {"data.global_batch_size": BATCH_OF_TOKENS, "run.tokens": LENGTHS}
    found = {point.name: point for point in points(tmp_path, rules=rules, seeds=[1])}
    for size, tokens, batch in (("d32", 1e5, 8), ("d64", 4e5, 16)):
        point = found[f"{size}-gamma1-seed1"]
        assert (point.config.data.global_batch_size, point.config.run.tokens) == (batch, tokens)
        assert point.steps == -(-tokens // (batch * 64)) and 0 <= point.tokens - tokens < batch * 64
    # What comes after both sees the tokens of whole steps.
    rules["schedule.warmup_steps"] = {"rule": "power", "of": "tokens", "at": 16 * 64, "value": 1, "exponent": 1}
    last = points(tmp_path, rules=rules, seeds=[1])[-1]
    assert last.config.schedule.warmup_steps == last.steps


def test_a_batch_of_budgets_and_of_fixed_tokens(tmp_path: Path) -> None:
    rules = {"data.global_batch_size": BATCH_OF_TOKENS}
    assert only(tmp_path, rules=rules, set={"run.tokens": 9e5}).config.data.global_batch_size == 24
    (point,) = points(tmp_path, rules=rules, axes={}, budgets=[1e12], seeds=[1])
    tokens = point.by_rule["run.tokens"]
    assert point.config.data.global_batch_size == round(8 * (tokens / 1e5) ** 0.5 / 4) * 4 > 8


def test_lengths_of_a_shape_that_a_rule_sets(tmp_path: Path) -> None:
    rules = {
        "model.num_layers": {"rule": "power", "of": "hidden_size", "at": 32, "value": 1, "exponent": 1},
        "run.tokens": {"rule": "per_parameter", "tokens": 2, "of": "non_embedding"},
    }
    shallow = only(tmp_path, rules={"run.tokens": rules["run.tokens"]})
    deep = only(tmp_path, rules=rules)
    assert (shallow.config.model.num_layers, deep.config.model.num_layers) == (4, 2)
    assert deep.config.run.tokens == pytest.approx(shallow.config.run.tokens / 2, rel=1e-3)


CIRCLES = [
    (
        {"data.global_batch_size": BATCH_OF_TOKENS,
         "run.tokens": {"rule": "power", "of": "batch_tokens", "at": 512, "value": 1e5, "exponent": 1}},
        "rules.data.global_batch_size is a function of tokens, and rules.run.tokens one of batch_tokens: a circle",
    ),
    (
        {"data.global_batch_size": BATCH_OF_TOKENS, "run.steps": {"rule": "constant", "value": 9}},
        "with run.steps the tokens follow from the batch: a circle: set run.tokens in place of run.steps",
    ),
    ({"data.global_batch_size": BATCH_OF_TOKENS}, "with run.steps the tokens follow from the batch"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "message"), CIRCLES, ids=["batch_tokens", "steps", "steps of the config"])
def test_circles_are_refused(tmp_path: Path, rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        points(tmp_path, rules=rules)
    assert message in str(refused.value)


def test_whole_numbers_are_those_of_the_schema(tmp_path: Path) -> None:
    """Any option whose type is int gets one; what is asked for is not rounded to none, and none stays none."""
    rules = {
        "validation.windows": {"rule": "constant", "value": 3.4},
        "checkpoint.interval": {"rule": "constant", "value": 0},
        "guard.replica_interval": {"rule": "constant", "value": 0.2},
        "schedule.warmup_steps": {"rule": "constant", "value": 0},
        "optimizer.eps": {"rule": "constant", "value": 1e-7},
    }
    config = only(tmp_path, rules=rules).config
    values = (config.validation.windows, config.checkpoint.interval, config.guard.replica_interval)
    assert values == (3, 0, 1) and all(type(value) is int for value in values)
    assert config.schedule.warmup_steps == 0 and config.optimizer.eps == 1e-7
    assert is_whole("model.head_dim") and not is_whole("run.tokens") and not is_whole("model.qk_norm")
    assert [name for name in option_types() if is_mapping(name)] == [
        "init.exponents", "data.toy_options", "optimizer.lr_factors", "validation.paths",
    ]  # fmt: skip


def test_arms_by_value_label_and_factor(tmp_path: Path) -> None:
    axes = {
        "size": {64: {"model.hidden_size": 64}, 32: {"model.hidden_size": 32}},
        "init.gamma": [1, 0.5],
        "optimizer.lr": {"factors": [1, 2], "tuned": True},
        "model.qk_norm": [True, False],
    }
    arms = {"size": {64: {"value": 0.002}}, "init.gamma": {"gamma0.5": {"value": 0.003}}}
    rules = {
        "optimizer.lr": {"rule": "constant", "value": 0.001, "arms": arms},
        "schedule.warmup_steps": {
            "rule": "constant", "value": 1,
            "arms": {"optimizer.lr": {2: {"value": 5}}, "model.qk_norm": {False: {"multiple_of": 4}}},
        },
    }  # fmt: skip
    found = {
        point.group: (point.config.optimizer.lr, point.config.schedule.warmup_steps)
        for point in points(tmp_path, axes=axes, rules=rules, seeds=[1], set={"model.attention_gate": "none"})
    }
    assert found["64-gamma1-lrx1-qk_normtrue"] == (0.002, 1)
    assert found["32-gamma1-lrx2-qk_normtrue"] == (0.002, 5)
    assert found["32-gamma0.5-lrx1-qk_normfalse"] == (0.003, 4)
    assert found["64-gamma1-lrx2-qk_normfalse"] == (0.004, 4)


POWER = GOOD["rules"]["optimizer.lr"]
BAD_ARMS = [
    ([1], "arms=[1] must map axes to their arms"),
    ({"init.gama": {1.0: {"value": 1}}}, "arms: init.gama is not an axis: use size, init.gamma"),
    ({"init.gamma": {0.7: {"value": 1}}}, "arms.init.gamma: 0.7 is no value of that axis: use [0.5, 1.0]"),
    ({"init.gamma": {True: {"value": 1}}}, "arms.init.gamma: True is no value"),
    ({"init.gamma": [0.5]}, "arms.init.gamma=[0.5] must map arms to arguments"),
    ({"init.gamma": {0.5: 0.1}}, "arms.init.gamma.0.5=0.1 must have arguments of power"),
    ({"init.gamma": {0.5: {"rule": "constant"}}}, "arms.init.gamma.0.5={'rule': 'constant'} must have arguments of power"),
    ({"init.gamma": {0.5: {"of": "width"}}}, "arms.init.gamma.0.5: of=width: use one of"),
    ({"init.gamma": {0.5: {"at": 0}}}, "arms.init.gamma.0.5: at=0 must be more than 0"),
    ({"init.gamma": {0.5: {"value": "high"}}}, "arms.init.gamma.0.5: value=high must be a number"),
    ({"init.gamma": {0.5: {"tokens": 1}}}, "arms.init.gamma.0.5: tokens is no argument of power"),
    ({"size": {"d32": {"multiple_of": 0}}}, "arms.size.d32: multiple_of=0 must be more than 0"),
]  # fmt: skip


@pytest.mark.parametrize(("arms", "message"), BAD_ARMS, ids=[message[:45] for _, message in BAD_ARMS])
def test_bad_arms_are_refused(tmp_path: Path, arms: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read_sweep(write(tmp_path, rules={"optimizer.lr": {**POWER, "arms": arms}}))
    assert message in str(refused.value) and "rules.optimizer.lr: " in str(refused.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": ["power"]}, "rule=['power']: use"),
        ({"rule": "table", "of": ["size"], "values": {}}, "of=['size'] must be the name of an axis"),
        ({"rule": "constant", "value": float("nan")}, "value=nan must be a number"),
        ({"rule": "power", "of": "parameters", "at": 1e-300, "value": 1, "exponent": 9}, "gives no number"),
    ],
)
def test_rules_that_give_no_number(tmp_path: Path, rule: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        points(tmp_path, rules={"optimizer.lr": rule})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("bounds", "value", "expected"),
    [
        ({"maximum": 100, "multiple_of": 64}, 120, 64),
        ({"minimum": 90, "multiple_of": 64}, 10, 128),
        (
            {"minimum": 65, "maximum": 127, "multiple_of": 64},
            10,
            "no multiple of 64 lies between minimum=65 and maximum=127",
        ),
    ],
)
def test_multiples_keep_to_the_bounds(tmp_path: Path, bounds: dict[str, Any], value: float, expected: Any) -> None:
    rules = {"run.steps": {"rule": "constant", "value": value, **bounds}}
    if isinstance(expected, str):
        with pytest.raises(ConfigurationError, match=expected):
            only(tmp_path, rules=rules)
    else:
        assert only(tmp_path, rules=rules).steps == expected


def test_factors_keep_to_the_bounds(tmp_path: Path) -> None:
    rules = {"optimizer.lr": {"rule": "constant", "value": 0.004, "maximum": 0.01}}
    axes = {"optimizer.lr": {"factors": [1, 4]}}
    assert [p.config.optimizer.lr for p in points(tmp_path, axes=axes, rules=rules, seeds=[1])] == [0.004, 0.01]
