"""Rules: options of a point as functions of its size. One table, `RULES`; the plan and the docs name them by its keys.

    rules:
      optimizer.lr: {rule: power, of: hidden_size, at: 128, value: 0.004, exponent: -0.5}
      run.tokens: {rule: per_parameter, tokens: 20, of: non_embedding}
      data.global_batch_size: {rule: power, of: tokens, at: 1.0e+9, value: 64, exponent: 0.5, multiple_of: 8}
      schedule.warmup_steps: {rule: table, of: size, values: {d64: 20, d128: 50}}

`arms` gives single arms other arguments: `arms: {init.gamma: {0.5: {value: 0.008}}}`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megagamma.errors import ConfigurationError
from megagamma.scaling.grid import Arm, Axis
from megagamma.scaling.options import is_number, is_whole

MEASURES = ("hidden_size", "num_layers", "parameters", "non_embedding", "flops_per_token", "tokens", "batch_tokens")


@dataclass(frozen=True)
class Size:
    """What rules are functions of."""

    measures: dict[str, float]
    """Of `MEASURES`: width, depth, all weights, weights without embedding and head, FLOPs of a token's training step,
    tokens of the run, tokens of a step. The last two are there once the rules before have set them."""
    labels: dict[str, str]
    """The point's label on each axis."""

    def measure(self, name: str, where: str) -> float:
        """One of them.

        Raises:
            ConfigurationError: it is not known when this rule is applied.
        """
        if name not in self.measures:
            raise ConfigurationError(f"{where}of={name}: use one of {', '.join(self.measures)}")
        return self.measures[name]


def constant(size: Size, where: str, *, value: float) -> float:  # noqa: ARG001 - the form of every rule
    """value"""
    return value


def power(size: Size, where: str, *, of: str, at: float, value: float, exponent: float) -> float:
    """value (x / at)^exponent, with x the measure `of`"""
    return float(value * (size.measure(of, where) / at) ** exponent)


def per_parameter(size: Size, where: str, *, tokens: float, of: str = "parameters") -> float:
    """tokens x weights; 20 per weight are about compute-optimal (arXiv 2203.15556) [REF]"""
    return tokens * size.measure(of, where)


def per_flops(size: Size, where: str, *, flops: float) -> float:
    """flops / FLOPs of one token: the tokens that a budget of FLOPs pays for"""
    return flops / size.measure("flops_per_token", where)


def table(size: Size, where: str, *, of: str, values: dict[str, float]) -> float:
    """values[label on axis `of`]"""
    label = size.labels.get(of)
    known = {str(key): value for key, value in values.items()}
    if label not in known:
        raise ConfigurationError(
            f"{where}values have none for {of}={label}: give one, or take the axis from {size.labels}"
        )
    return known[label]


RULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "power": power,
    "per_parameter": per_parameter,
    "per_flops": per_flops,
    "table": table,
}
"""Every rule by its name; its docstring is its formula."""

_EXAMPLE = "such as {init.gamma: {0.5: {value: 0.008}}}"
BOUNDS = ("multiple_of", "minimum", "maximum")
_COMMON = ("rule", "multiple_of", "minimum", "maximum", "arms")
# First what the others may be functions of.
_BATCH, _TOKENS, _STEPS = _ORDER = ("data.global_batch_size", "run.tokens", "run.steps")


def _arguments(function: Callable[..., float]) -> tuple[list[str], list[str]]:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [p.name for p in parameters], [p.name for p in parameters if p.default is p.empty]


def check_rule(rule: Any, where: str) -> None:
    """Check the form of a rule.

    Raises:
        ConfigurationError: no such rule, or an argument that is missing, unknown or no number.
    """
    if not isinstance(rule, dict) or "rule" not in rule:
        raise ConfigurationError(f"{where}{str(rule)[:100]} must have a rule: use {', '.join(RULES)}")
    name = rule["rule"]
    if not isinstance(name, str) or name not in RULES:
        near = difflib.get_close_matches(str(name), RULES, n=1)
        raise ConfigurationError(f"{where}rule={str(name)[:60]}: use {near[0] if near else ', '.join(RULES)}")
    allowed, required = _arguments(RULES[name])
    for key in rule:
        if key not in (*allowed, *_COMMON):
            raise ConfigurationError(
                f"{where}{key} is no argument of {name}: use {', '.join((*allowed, *_COMMON[1:]))}"
            )
    for key in required:
        if key not in rule:
            raise ConfigurationError(f"{where}{name} needs {', '.join(required)}; {key} is missing")
    for key in (*allowed, "multiple_of", "minimum", "maximum"):
        if key in rule and key not in ("of", "values") and not is_number(rule[key]):
            raise ConfigurationError(f"{where}{key}={str(rule[key])[:60]} must be a number")
    if "at" in rule and not rule["at"] > 0:
        raise ConfigurationError(f"{where}at={rule['at']} must be more than 0")
    if name == "table" and not isinstance(rule["of"], str):
        raise ConfigurationError(f"{where}of={str(rule['of'])[:60]} must be the name of an axis")
    if "of" in rule and name != "table" and rule["of"] not in MEASURES:
        raise ConfigurationError(f"{where}of={str(rule['of'])[:60]}: use one of {', '.join(MEASURES)}")
    if "values" in rule and (not isinstance(rule["values"], dict) or not all(map(is_number, rule["values"].values()))):
        raise ConfigurationError(f"{where}values={str(rule['values'])[:100]} must map labels to numbers")
    if "multiple_of" in rule and not rule["multiple_of"] > 0:
        raise ConfigurationError(f"{where}multiple_of={rule['multiple_of']} must be more than 0")


def check_arms(rule: dict[str, Any], grid: Sequence[Axis], where: str) -> None:
    """Check what a rule gives single arms: that these exist, and that the rule is one with their arguments too.

    Args:
        rule: of a form that `check_rule` takes.
        grid: the sweep's axes.

    Raises:
        ConfigurationError: naming the axis or the arm.
    """
    arms = rule.get("arms")
    if arms is None:
        return
    if not isinstance(arms, dict):
        raise ConfigurationError(f"{where}arms={str(arms)[:100]} must map axes to their arms: {_EXAMPLE}")
    for name, changes in arms.items():
        axis = next((axis for axis in grid if axis.name == name), None)
        if axis is None:
            raise ConfigurationError(f"{where}arms: {name} is not an axis: use {', '.join(axis.name for axis in grid)}")
        if not isinstance(changes, dict):
            raise ConfigurationError(f"{where}arms.{name}={str(changes)[:100]} must map arms to arguments: {_EXAMPLE}")
        for key, change in changes.items():
            if not any(arm.has_key(key) for arm in axis.arms):
                raise ConfigurationError(
                    f"{where}arms.{name}: {key} is no value of that axis: use {[arm.value for arm in axis.arms]}"
                )
            if not isinstance(change, dict) or {"rule", "arms"} & set(change):
                raise ConfigurationError(
                    f"{where}arms.{name}.{key}={str(change)[:100]} must have arguments of {rule['rule']}: {_EXAMPLE}"
                )
            check_rule(rule | change, f"{where}arms.{name}.{key}: ")


def arguments_for(rule: dict[str, Any], arms: dict[str, Arm]) -> dict[str, Any]:
    """A rule's arguments for a point, those of its arms included.

    Args:
        arms: of the point, by axis.
    """
    result = {key: value for key, value in rule.items() if key != "arms"}
    for axis, changes in (rule.get("arms") or {}).items():
        for key, change in changes.items():
            if arms[axis].has_key(key):
                result |= change
    return result


def in_order(rules: dict[str, dict[str, Any]], has_tokens: bool) -> list[str]:
    """The options that rules set, in the order in which these are applied: first what others may be functions of.

    The model's shape comes first, then the batch size, then the length. A batch size that is a function of the run's tokens
    comes after these.

    Args:
        rules: by option, from `arguments_for`.
        has_tokens: whether the length is given in tokens where no rule sets it.

    Raises:
        ConfigurationError: the batch size is a function of the tokens, and these are one of the batch size.
    """
    order = [_BATCH, _TOKENS, _STEPS]
    if rules.get(_BATCH, {}).get("of") == "tokens" and rules[_BATCH]["rule"] != "table":
        tokens = rules.get(_TOKENS)
        if tokens is not None and tokens.get("of") in ("tokens", "batch_tokens") and tokens["rule"] != "table":
            raise ConfigurationError(
                f"rules.{_BATCH} is a function of tokens, and rules.{_TOKENS} one of {tokens['of']}: a circle: change one"
            )
        if _STEPS in rules or (tokens is None and not has_tokens):
            raise ConfigurationError(
                f"rules.{_BATCH} is a function of tokens, and with {_STEPS} the tokens follow from the batch: a circle: "
                f"set {_TOKENS} in place of {_STEPS}"
            )
        order = [_TOKENS, _BATCH]
    shape = [option for option in sorted(rules) if option.startswith("model.") or option == "data.sequence_length"]
    first = [*shape, *(option for option in order if option in rules)]
    return [*first, *(option for option in sorted(rules) if option not in first)]


def apply_rule(option: str, rule: dict[str, Any], size: Size, where: str) -> float | int:
    """The value that a rule gives an option.

    Args:
        rule: from `arguments_for`.

    Raises:
        ConfigurationError: a measure or label that is not there, or no usable number.
    """
    arguments = {key: value for key, value in rule.items() if key not in _COMMON}
    try:
        value = RULES[rule["rule"]](size, where, **arguments)
        if "minimum" in rule:
            value = max(value, rule["minimum"])
        if "maximum" in rule:
            value = min(value, rule["maximum"])
        multiple = rule.get("multiple_of", 1 if is_whole(option) else None)
        if multiple:
            # Nothing that is asked for is rounded away.
            value = round(value / multiple) * multiple or (multiple if value else 0)
            if value > rule.get("maximum", value):
                value = math.floor(rule["maximum"] / multiple) * multiple
            elif value < rule.get("minimum", value):
                value = math.ceil(rule["minimum"] / multiple) * multiple
            if not rule.get("minimum", value) <= value <= rule.get("maximum", value):
                raise ConfigurationError(
                    f"{where}no multiple of {multiple} lies between minimum={rule.get('minimum')} and "
                    f"maximum={rule.get('maximum')}: change one of them"
                )
    except (OverflowError, ValueError, ZeroDivisionError) as error:
        raise ConfigurationError(f"{where}gives no number ({error}): change its arguments") from error
    # 12 digits: the same number on every machine, whatever its pow() rounds.
    return int(value) if is_whole(option) else float(f"{value:.12g}")


def describe(option: str, rule: dict[str, Any]) -> str:
    """A rule as one line, with its formula."""
    text = ", ".join(f"{key}={value}" for key, value in rule.items() if key not in ("rule", "arms"))
    arms = f"; other in arms {rule['arms']}" if rule.get("arms") else ""
    return f"{option}: {rule['rule']}({text}) = {inspect.getdoc(RULES[rule['rule']])}{arms}"
