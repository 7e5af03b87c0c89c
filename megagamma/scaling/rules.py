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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megagamma.errors import ConfigurationError

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

_COMMON = ("rule", "multiple_of", "minimum", "maximum", "arms")
# First what the others may be functions of.
ORDER = ("data.global_batch_size", "run.tokens", "run.steps")
_WHOLE = ("data.global_batch_size", "run.steps", "schedule.warmup_steps", "data.micro_batch_size")


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
    if name not in RULES:
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
        if key in rule and key not in ("of", "values") and not _is_number(rule[key]):
            raise ConfigurationError(f"{where}{key}={str(rule[key])[:60]} must be a number")
    if "at" in rule and not rule["at"] > 0:
        raise ConfigurationError(f"{where}at={rule['at']} must be more than 0")
    if "of" in rule and name != "table" and rule["of"] not in MEASURES:
        raise ConfigurationError(f"{where}of={str(rule['of'])[:60]}: use one of {', '.join(MEASURES)}")
    if "values" in rule and (not isinstance(rule["values"], dict) or not all(map(_is_number, rule["values"].values()))):
        raise ConfigurationError(f"{where}values={str(rule['values'])[:100]} must map labels to numbers")
    for axis, changes in (rule.get("arms") or {}).items():
        for label, change in changes.items() if isinstance(changes, dict) else [("", None)]:
            if not isinstance(change, dict) or set(change) - {*allowed, *_COMMON[1:4]}:
                raise ConfigurationError(
                    f"{where}arms.{axis}.{label}: must have arguments of {name}: {', '.join(allowed)}"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def arguments_for(rule: dict[str, Any], labels: dict[str, str], values: dict[str, Any]) -> dict[str, Any]:
    """A rule's arguments for a point, those of its arms included.

    Args:
        labels, values: of the point on each axis.
    """
    result = {key: value for key, value in rule.items() if key != "arms"}
    for axis, changes in (rule.get("arms") or {}).items():
        for key, change in changes.items():
            if axis in labels and (key == values[axis] or str(key) == labels[axis]):
                result |= change
    return result


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
    except (OverflowError, ZeroDivisionError) as error:
        raise ConfigurationError(f"{where}gives no number ({error}): change its arguments") from error
    if "minimum" in rule:
        value = max(value, rule["minimum"])
    if "maximum" in rule:
        value = min(value, rule["maximum"])
    multiple = rule.get("multiple_of", 1 if option in _WHOLE else None)
    if multiple:
        value = max(multiple, round(value / multiple) * multiple)
    # 12 digits: the same number on every machine, whatever its pow() rounds.
    return int(value) if option in _WHOLE else float(f"{value:.12g}")


def describe(option: str, rule: dict[str, Any]) -> str:
    """A rule as one line, with its formula."""
    text = ", ".join(f"{key}={value}" for key, value in rule.items() if key not in ("rule", "arms"))
    arms = f"; other in arms {rule['arms']}" if rule.get("arms") else ""
    return f"{option}: {rule['rule']}({text}) = {inspect.getdoc(RULES[rule['rule']])}{arms}"
