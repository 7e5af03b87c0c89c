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
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagamma.config.io import known_keys, read_sections
from megagamma.config.schema import ROLES
from megagamma.config.yaml_reader import read_yaml
from megagamma.errors import ConfigurationError
from megagamma.reading import Unreadable
from megagamma.scaling.rules import check_rule

_KEYS = (
    "name", "config", "set", "axes", "seeds", "rules", "exclude", "budgets", "arms", "launch", "retries", "stop_lost",
)  # fmt: skip
_SIZE_OPTIONS = ("model.hidden_size", "model.num_layers", "model.ffn_hidden_size", "model.num_attention_heads")
_LENGTH_OPTIONS = ("run.tokens", "run.steps")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Given to each point by the sweep itself.
_RESERVED = ("run.name", "run.folder", "run.seed", "run.resume", "logging.wandb_group")


@dataclass(frozen=True)
class Launch:
    """How a point is started."""

    processes: int = 1
    """Ranks of a point."""
    nodes: int = 1
    """Hosts under SLURM, which share the ranks equally."""
    time: str = ""
    """Time limit under SLURM, as sbatch takes it; empty: the partition's."""


@dataclass(frozen=True)
class Arm:
    """One value of an axis."""

    label: str
    """In names and tables."""
    value: Any
    """As the file gives it: the option's value, its factor, or the label of a named arm."""
    options: dict[str, Any]
    launch: dict[str, Any] = field(default_factory=dict)
    factor: float | None = None
    """Of the rule of the axis' option, in place of a value."""


@dataclass(frozen=True)
class Axis:
    """A dimension of the grid."""

    name: str
    arms: tuple[Arm, ...]
    is_tuned: bool = False
    """Whether its best value counts, and not each."""
    option: str | None = None
    """The option that it sets; None for named arms."""

    @property
    def sets(self) -> set[str]:
        """Options that any of its arms sets."""
        return {name for arm in self.arms for name in arm.options} | ({self.option} if self.option else set())

    @property
    def is_size(self) -> bool:
        """Whether it changes the model's size or the length of a run."""
        return bool(self.sets & {*_SIZE_OPTIONS, *_LENGTH_OPTIONS}) or self.name == "budget"


@dataclass(frozen=True)
class StopLost:
    """When a point of a tuned axis is ended before its end: its validation loss is behind the best of its group."""

    after: float
    """Share of the run before which none is ended."""
    margin: float
    """Unit: nats per token."""


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file describes it, checked as far as one can without its points."""

    name: str
    file: Path
    configs: tuple[Path, ...]
    options: dict[str, Any]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    rules: dict[str, dict[str, Any]]
    exclude: tuple[dict[str, str], ...]
    """Labels by axis; a point that has them all is left out."""
    budgets: tuple[float, ...]
    arms: tuple[str, ...]
    """Axes whose values are compared."""
    launch: Launch
    retries: int
    stop_lost: StopLost | None

    def axis(self, name: str) -> Axis:
        """The axis of a name."""
        return next(axis for axis in self.axes if axis.name == name)


def option_names() -> list[str]:
    """Every option of a run that a sweep may set, `init.ROLE` for single exponents included."""
    return [*known_keys(), *(f"init.{role}" for role in ROLES)]


def check_option(name: Any, where: str) -> str:
    """The name of an option.

    Raises:
        ConfigurationError: there is none of that name, or the sweep gives it itself.
    """
    if name in _RESERVED:
        raise ConfigurationError(
            f"{where}{name}: is given by the sweep itself (seeds: [...] sets the seeds): leave it out"
        )
    names = option_names()
    section, _, key = str(name).partition(".")
    if name in names or (section in ("optimizer", "init") and f"{section}.{key.partition('.')[0]}" in names):
        return str(name)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "see megagamma pretrain --help"
    raise ConfigurationError(f"{where}{str(name)[:100]} is not an option: {hint}")


def flat_options(sections: dict[str, Any], where: str) -> dict[str, Any]:
    """Sections or dotted names of options as `section.key: value`.

    Raises:
        ConfigurationError: an option that does not exist.
    """
    result: dict[str, Any] = {}
    sections_of = {key.partition(".")[0] for key in known_keys() if "." in key}
    for name, value in sections.items():
        items = {f"{name}.{key}": item for key, item in value.items()} if name in sections_of else {name: value}
        if name in sections_of and not isinstance(value, dict):
            raise ConfigurationError(f"{where}{name}: is a section: give its options")
        for key, item in items.items():
            result[check_option(key, where)] = item
    return result


def find_file(name: str, sweep: Path, where: str, tree: Path | None = None) -> Path:
    """A file that a sweep names: relative to `tree`, to the working directory, to the sweep's folder, or to one around it.

    Raises:
        ConfigurationError: there is none.
    """
    for folder in (*([tree] if tree else []), Path(), *sweep.absolute().parents):
        if (folder / name).is_file():
            return folder / name
    raise ConfigurationError(f"{where}{name}: there is no such file, here or beside the sweep: check the path")


def label_of(value: Any) -> str:
    """A value as a part of a name: 0.004, true, bf16."""
    text = f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_") or "empty"


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
            value = read_sections(str(find_file(value, self.file, where, self.tree)))
        if not isinstance(value, dict):
            raise ConfigurationError(f"{where}must be options, such as {{model.hidden_size: 64}}, or a config file")
        value = dict(value)
        launch = value.pop("launch", None) or {}
        self.check_launch(launch, where)
        if "file" in value:
            named = value.pop("file")
            value = {**read_sections(str(find_file(named, self.file, where, self.tree))), **value}
        return Arm(str(label), str(label), flat_options(value, where), launch)

    def axis(self, name: str, value: Any) -> Axis:
        where = f"{self.where}axes.{name}: "
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
            if not isinstance(factors, list) or not all(_is_number(one) and one > 0 for one in factors):
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
        if values.get("processes", 1) % values.get("nodes", 1):
            raise ConfigurationError(
                f"{where}launch.nodes={values['nodes']} must divide launch.processes={values.get('processes', 1)}"
            )

    def seeds(self) -> tuple[int, ...]:
        seeds = self.listing("seeds") or [1234]
        if not all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds):
            raise self.fail(f"seeds={seeds} must be whole numbers of 0 or more")
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
                # A label such as 64 is a number in YAML.
                arm = next(
                    (arm for arm in axis.arms if value in (arm.value, arm.label) or str(value) == arm.label), None
                )
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
            or not all(map(_is_number, values.values()))
        ):
            raise self.fail(f"stop_lost={values} must have two numbers, after and margin")
        if not 0 < values["after"] < 1 or values["margin"] < 0:
            raise self.fail(f"stop_lost={values}: after must lie between 0 and 1, and margin must be 0 or more")
        return StopLost(float(values["after"]), float(values["margin"]))

    def rules(self) -> dict[str, dict[str, Any]]:
        found = self.mapping("rules")
        for option, rule in found.items():
            check_option(option, f"{self.where}rules: ")
            check_rule(rule, f"{self.where}rules.{option}: ")
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    options = flat_options(reader.mapping("set"), reader.where + "set: ")
    rules = reader.rules()
    if budgets is not None:
        # On the command line they take the place of the file's lengths.
        options, rules = ({k: v for k, v in one.items() if k not in _LENGTH_OPTIONS} for one in (options, rules))
    budgets = tuple(reader.listing("budgets")) if budgets is None else budgets
    _check_writers(reader, axes, options, rules, bool(budgets))
    reader.check_launch(values.get("launch") or {}, reader.where)
    retries = values.get("retries", 2)
    if type(retries) is not int or retries < 0:
        raise reader.fail(f"retries={retries} must be a whole number of 0 or more")
    if not all(_is_number(one) and 0 < one < 1e30 for one in budgets):
        raise reader.fail(f"budgets={list(budgets)} must be FLOPs, numbers above 0")
    return Sweep(
        name=reader.name(),
        file=file,
        configs=tuple(find_file(str(one), file, f"{file}: config: ", tree) for one in reader.listing("config")),
        options=options,
        axes=axes,
        seeds=reader.seeds(),
        rules=rules,
        exclude=reader.exclusions(axes),
        budgets=tuple(float(one) for one in budgets),
        arms=reader.arms(axes),
        launch=Launch(**(values.get("launch") or {})),
        retries=retries,
        stop_lost=reader.stop_lost(),
    )


def _check_writers(
    reader: _Reader, axes: tuple[Axis, ...], options: dict[str, Any], rules: dict[str, Any], has_budgets: bool
) -> None:
    """Refuse an option that two parts of a sweep would set."""
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
        for option in _LENGTH_OPTIONS:
            if option in owner or option in rules or option in options:
                raise reader.fail(f"budgets and {option} both set the length of a run: keep one")
