"""A sweep's YAML file: which runs a study is made of.

name: widths                              # its folder is runs/sweeps/NAME
config: [configs/demo.yaml]               # what every point starts from; later files win
set: {logging.wandb: disabled}            # options of every point
axes:
  size:                                   # arms by name: options, or a config file
    d64: {model.hidden_size: 64, launch: {processes: 1}}
    d128: configs/model/1m.yaml
  init.gamma: [0.5, 1.0]                  # values of one option
  optimizer.lr: {factors: [0.5, 1, 2], tuned: true}   # multiples of its rule; the best one is what counts
seeds: [1, 2, 3]
rules: {optimizer.lr: {rule: power, of: hidden_size, at: 64, value: 0.004, exponent: -0.5}}
exclude: [{size: d128, init.gamma: 0.5}]
budgets: [1.0e+15]                        # FLOPs per point: tokens of each size follow
arms: [init.gamma]                        # axes whose values are compared (default: those that set no size)
launch: {processes: 2, nodes: 1, time: "02:00:00"}
retries: 2                                # of a point that fails
stop_lost: {after: 0.5, margin: 0.2}      # end a tuned point that is 0.2 nats behind the best of its group
"""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path
from typing import Any

from megagamma.config.io import read_sections
from megagamma.config.yaml_reader import read_yaml
from megagamma.errors import ConfigurationError
from megagamma.reading import Unreadable
from megagamma.scaling.grid import (
    BUDGET,
    COLUMNS,
    LENGTH_OPTIONS,
    Arm,
    Axis,
    Launch,
    StopLost,
    Sweep,
    budget_axis,
    label_of,
)
from megagamma.scaling.options import check_option, flat_options, is_number, option_names
from megagamma.scaling.rules import check_arms, check_rule

_KEYS = (
    "name", "config", "set", "axes", "seeds", "rules", "exclude", "budgets", "arms", "launch", "retries", "stop_lost",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LARGEST_SEED = 2**63 - 1  # a column of the table holds signed numbers of 64 bits


def find_file(name: str, sweep: Path, where: str, tree: Path | None = None) -> Path:
    """A file that a sweep names: relative to `tree`, to the working directory, to the sweep's folder, or to one around it.

    Raises:
        ConfigurationError: there is none.
    """
    for folder in (*([tree] if tree else []), Path(), *sweep.absolute().parents):
        if (folder / name).is_file():
            return folder / name
    raise ConfigurationError(f"{where}{name}: there is no such file, here or beside the sweep: check the path")


class _Reader:
    """Checks a sweep file piece by piece; every message begins with the file's name."""

    def __init__(self, file: Path, values: dict[str, Any], tree: Path | None) -> None:
        self.file, self.values, self.tree = file, values, tree
        self.where = f"{file}: "

    def fail(self, text: str) -> ConfigurationError:
        return ConfigurationError(self.where + text)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fail(f"{key}={str(value)[:100]} must be a mapping: see docs/sweeps.md")
        return value

    def listing(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if value is None:
            return []
        return list(value) if isinstance(value, list) else [value]

    def name(self) -> str:
        name = self.values.get("name", self.file.stem)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise self.fail(f"name={str(name)[:100]!r} must be letters, digits, dots, - and _: it names a folder")
        return name

    def named_arm(self, axis: str, label: Any, value: Any) -> Arm:
        where = f"{self.where}axes.{axis}.{label}: "
        if not _NAME.fullmatch(str(label)):
            raise ConfigurationError(f"{where}a label must be letters, digits, dots, - and _")
        if isinstance(value, str):
            value = {"file": value}
        if not isinstance(value, dict):
            raise ConfigurationError(f"{where}must be options, such as {{model.hidden_size: 64}}, or a config file")
        value = dict(value)
        launch = value.pop("launch", None) or {}
        self.check_launch(launch, where)
        options: dict[str, Any] = {}
        if "file" in value:
            named = value.pop("file")
            if not isinstance(named, str):
                raise ConfigurationError(f"{where}file={str(named)[:100]} must be the path of one config file")
            options = flat_options(read_sections(str(find_file(named, self.file, where, self.tree))), where)
        # Option by option: the file keeps what the arm does not set of a section.
        return Arm(str(label), str(label), options | flat_options(value, where), launch)

    def axis(self, name: str, value: Any) -> Axis:
        where = f"{self.where}axes.{name}: "
        if name == BUDGET:
            raise ConfigurationError(
                f"{where}is the name of the axis of the budgets: give budgets: [...], or rename it"
            )
        if name in COLUMNS:
            raise ConfigurationError(f"{where}the table has a column {name} of its own: rename the axis")
        is_option = name in option_names()
        if isinstance(value, dict) and not is_option and "values" not in value:
            arms = tuple(self.named_arm(name, label, options) for label, options in value.items())
            return self.checked(Axis(name, arms))
        check_option(name, f"{self.where}axes: unknown axis: ")
        if isinstance(value, dict):
            unknown = set(value) - {"values", "factors", "tuned"}
            if unknown or ("values" in value) == ("factors" in value):
                raise ConfigurationError(f"{where}{value} must have values or factors, and may have tuned: true")
        else:
            value = {"values": value}
        tuned = value.get("tuned", False)
        if not isinstance(tuned, bool):
            raise ConfigurationError(f"{where}tuned={tuned} must be true or false")
        leaf = name.rpartition(".")[2]
        if "factors" in value:
            factors = value["factors"]
            if not isinstance(factors, list) or not all(is_number(one) and one > 0 for one in factors):
                raise ConfigurationError(f"{where}factors={factors} must be a list of numbers above 0")
            if name not in self.mapping("rules"):
                raise ConfigurationError(f"{where}factors multiply the value of a rule: give rules.{name}, or values")
            arms = tuple(Arm(f"{leaf}x{label_of(one)}", one, {}, factor=float(one)) for one in factors)
            return self.checked(Axis(name, arms, tuned, name))
        if not isinstance(value["values"], list):
            raise ConfigurationError(f"{where}{value['values']} must be a list of values, such as [0.5, 1.0]")
        arms = tuple(Arm(f"{leaf}{label_of(one)}", one, {name: one}) for one in value["values"])
        return self.checked(Axis(name, arms, tuned, name))

    def checked(self, axis: Axis) -> Axis:
        where = f"{self.where}axes.{axis.name}: "
        if not axis.arms:
            raise ConfigurationError(f"{where}has no values: an axis without values makes an empty grid: give some")
        labels = [arm.label for arm in axis.arms]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise ConfigurationError(f"{where}{twice} is there twice: points would differ in nothing: keep one")
        return axis

    def check_launch(self, values: Any, where: str) -> None:
        if not isinstance(values, dict) or set(values) - {"processes", "nodes", "time"}:
            raise ConfigurationError(f"{where}launch={values} must have processes, nodes or time")
        for name in ("processes", "nodes"):
            number = values.get(name, 1)
            if type(number) is not int or number < 1:
                raise ConfigurationError(f"{where}launch.{name}={number} must be a whole number of 1 or more")
        if not isinstance(values.get("time", ""), str):
            raise ConfigurationError(f'{where}launch.time={values["time"]} must be text, such as "02:00:00"')

    def seeds(self) -> tuple[int, ...]:
        seeds = self.listing("seeds") if "seeds" in self.values else [1234]
        if not seeds:
            raise self.fail("seeds has none: a sweep without seeds has no points: give some, or leave it out for 1234")
        if not all(type(seed) is int and 0 <= seed <= _LARGEST_SEED for seed in seeds):
            raise self.fail(
                f"seeds={str(seeds)[:100]} must be whole numbers of 0 or more, and at most {_LARGEST_SEED} (2^63 - 1)"
            )
        if len(set(seeds)) < len(seeds):
            raise self.fail(f"seeds={seeds}: one is there twice: points would differ in nothing")
        return tuple(seeds)

    def exclusions(self, axes: tuple[Axis, ...]) -> tuple[dict[str, str], ...]:
        found = []
        for entry in self.listing("exclude"):
            if not isinstance(entry, dict) or not entry:
                raise self.fail(f"exclude: {entry} must map axes to values")
            labels = {}
            for name, value in entry.items():
                axis = next((axis for axis in axes if axis.name == name), None)
                if axis is None:
                    raise self.fail(f"exclude: {name} is not an axis: use {', '.join(axis.name for axis in axes)}")
                arm = next((arm for arm in axis.arms if arm.has_key(value)), None)
                if arm is None:
                    raise self.fail(
                        f"exclude: {name}={value} is no value of that axis: use {[a.value for a in axis.arms]}"
                    )
                labels[name] = arm.label
            found.append(labels)
        return tuple(found)

    def arms(self, axes: tuple[Axis, ...]) -> tuple[str, ...]:
        names = self.listing("arms")
        for name in names:
            if name not in [axis.name for axis in axes]:
                raise self.fail(f"arms: {name} is not an axis: use {', '.join(axis.name for axis in axes)}")
        return tuple(names) or tuple(axis.name for axis in axes if not axis.is_size and not axis.is_tuned)

    def stop_lost(self) -> StopLost | None:
        values = self.values.get("stop_lost")
        if values is None:
            return None
        if (
            not isinstance(values, dict)
            or set(values) != {"after", "margin"}
            or not all(map(is_number, values.values()))
        ):
            raise self.fail(f"stop_lost={values} must have two numbers, after and margin")
        if not 0 < values["after"] < 1 or values["margin"] < 0:
            raise self.fail(f"stop_lost={values}: after must lie between 0 and 1, and margin must be 0 or more")
        return StopLost(float(values["after"]), float(values["margin"]))

    def rules(self, grid: tuple[Axis, ...]) -> dict[str, dict[str, Any]]:
        found = self.mapping("rules")
        for option, rule in found.items():
            check_option(option, f"{self.where}rules: ")
            check_rule(rule, f"{self.where}rules.{option}: ")
            check_arms(rule, grid, f"{self.where}rules.{option}: ")
        return found

    def budgets(self, given: tuple[float, ...] | None) -> tuple[float, ...]:
        budgets = self.listing("budgets") if given is None else list(given)
        if not all(is_number(one) and 0 < one < 1e30 for one in budgets):
            raise self.fail(f"budgets={budgets} must be FLOPs, numbers above 0")
        return tuple(float(one) for one in budgets)


def read_sweep(path: str | Path, budgets: tuple[float, ...] | None = None, tree: Path | None = None) -> Sweep:
    """Read and check a sweep file.

    Args:
        budgets: FLOPs per point, in place of the file's.
        tree: where the config files that it names are looked up first, such as a snapshot of the checkout.

    Raises:
        ConfigurationError: naming the file, the key, its value and what is wrong with it.
    """
    file = Path(path)
    try:
        values = read_yaml(file)
    except FileNotFoundError as error:
        known = ", ".join(sorted(str(f) for f in Path("configs/sweeps").glob("*.yaml"))) or "a YAML file"
        raise ConfigurationError(f"{file}: there is no such sweep: use {known}") from error
    except (OSError, Unreadable) as error:
        raise ConfigurationError(f"{file}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{file}: must be a mapping with name, config and axes: see configs/sweeps/smoke.yaml")
    for key in values:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.5)
            raise ConfigurationError(
                f"{file}: {key} is not a key of a sweep: use {near[0] if near else ', '.join(_KEYS)}"
            )
    reader = _Reader(file, values, tree)
    axes = tuple(reader.axis(str(name), value) for name, value in reader.mapping("axes").items())
    given = reader.budgets(budgets)
    budget = budget_axis(given)
    grid = (*axes, reader.checked(budget)) if budget else axes
    options = flat_options(reader.mapping("set"), reader.where + "set: ")
    rules = reader.rules(grid)
    if budgets is not None:
        # On the command line they take the place of the file's lengths.
        options, rules = ({k: v for k, v in one.items() if k not in LENGTH_OPTIONS} for one in (options, rules))
    _check_writers(reader, axes, options, rules, bool(given))
    reader.check_launch(values.get("launch") or {}, reader.where)
    retries = values.get("retries", 2)
    if type(retries) is not int or retries < 0:
        raise reader.fail(f"retries={retries} must be a whole number of 0 or more")
    return Sweep(
        name=reader.name(),
        file=file,
        configs=tuple(find_file(str(one), file, f"{file}: config: ", tree) for one in reader.listing("config")),
        options=options,
        axes=axes,
        seeds=reader.seeds(),
        rules=rules,
        exclude=reader.exclusions(grid),
        budgets=given,
        arms=reader.arms(grid),
        launch=Launch(**(values.get("launch") or {})),
        retries=retries,
        stop_lost=reader.stop_lost(),
    )


def _check_writers(
    reader: _Reader, axes: tuple[Axis, ...], options: dict[str, Any], rules: dict[str, Any], has_budgets: bool
) -> None:
    """Refuse an option that two parts of a sweep would set; run.steps and run.tokens are one."""
    sources = [*((f"axis {axis.name}", axis.sets) for axis in axes), ("set", set(options)), ("rules", set(rules))]
    lengths = [(place, option) for place, names in sources for option in LENGTH_OPTIONS if option in names]
    for (place, option), (other, second) in itertools.combinations(lengths, 2):
        # Arms of one axis may differ in which one they set.
        if option != second and (place != other or place == "rules"):
            raise reader.fail(f"{place} sets {option}, and {other} {second}: both are the length of a run: keep one")
    owner: dict[str, str] = {}
    for axis in axes:
        for option in sorted(axis.sets):
            if option in owner:
                raise reader.fail(
                    f"axes {owner[option]} and {axis.name} both set {option}: two axes on one option: keep one"
                )
            owner[option] = axis.name
    for option in rules:
        axis_name = owner.get(option)
        has_factors = axis_name is not None and any(a.factor for x in axes if x.name == axis_name for a in x.arms)
        if axis_name is not None and not has_factors:
            raise reader.fail(
                f"rules.{option} and axis {axis_name} both set {option}: keep one, or give the axis factors"
            )
    for option in options:
        if option in owner or option in rules:
            other = f"axis {owner[option]}" if option in owner else f"rules.{option}"
            raise reader.fail(f"set.{option} and {other} both set {option}: keep one")
    if has_budgets:
        for option in LENGTH_OPTIONS:
            if option in owner or option in rules or option in options:
                raise reader.fail(f"budgets and {option} both set the length of a run: keep one")
