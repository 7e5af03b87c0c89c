"""The points of a sweep: its grid expanded, each with its own config, name and content hash."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import os
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megagamma.config.io import as_dict, build_parser, from_dict, parse_namespace, to_config
from megagamma.config.resolve import resolve, validate
from megagamma.config.rules import divisors
from megagamma.config.schema import Config
from megagamma.data.preparation.manifest import read_manifest
from megagamma.data.preparation.prepare import PrepareSettings, embedded_settings
from megagamma.data.schedule import samples_before, total_steps
from megagamma.errors import CheckpointError, ConfigurationError, DataError, MegagammaError
from megagamma.files import read_json
from megagamma.owned import file_digest
from megagamma.planning.flops import flops_per_token, parameter_counts
from megagamma.runs.folder import checkpoint_folders
from megagamma.scaling.grid import BUDGET, Arm, Launch, Sweep
from megagamma.scaling.options import option_types, set_option
from megagamma.scaling.rules import BOUNDS, Size, apply_rule, arguments_for, in_order

ASSUMED_VOCABULARY = 32000
"""Where neither the config nor prepared data says one: only for a plan."""

# What changes neither the numbers of a run nor the files that others read.
_IRRELEVANT = {
    "run": ("name", "folder", "branch_from", "resume", "threads", "timeout_minutes", "start_minutes"),
    "data": ("paths", "corpus", "cache", "verify"),
    "validation": ("paths",),
    "checkpoint": ("interval", "keep_last", "asynchronous", "on_damage"),
    "parallel": ("memory_gib",),
    "logging": ("console_interval", "wandb", "wandb_project", "wandb_group"),
}
# Options that came later: at their default a point is what it was before.
_ADDED: dict[tuple[str, str], Any] = {
    ("run", "compile"): "auto",
    ("data", "toy"): "",
    ("data", "toy_options"): {},
    ("init", "mup_base_width"): 128,
}


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """From its labels, unique in the sweep."""
    labels: dict[str, str]
    """Label on each axis, budget included; without the seed."""
    values: dict[str, Any]
    """Value on each axis: of the option that it sets, or the label of a named arm."""
    seed: int
    config: Config
    """Resolved and validated for `launch.processes`; its vocabulary may be unknown."""
    launch: Launch
    vocabulary: int
    """Known, or assumed for the plan."""
    by_rule: dict[str, Any] = field(default_factory=dict)
    """Options that rules gave, with their values."""
    tuned: tuple[str, ...] = ()
    """Axes whose best value counts."""

    @property
    def group(self) -> str:
        """Name without the seed."""
        return self.name.rpartition("-seed")[0]

    @property
    def comparison(self) -> str:
        """Name without the seed and the labels of tuned axes: points of one name compete for the best value."""
        return "-".join(label for axis, label in self.labels.items() if axis not in self.tuned) or "point"

    @property
    def tuning_group(self) -> tuple[str, int]:
        """What points share that differ in tuned axes only."""
        return self.comparison, self.seed

    @property
    def sized(self) -> Config:
        """The config with its vocabulary."""
        config = copy.deepcopy(self.config)
        config.model.vocab_size = self.vocabulary
        return config

    # The trunk's files and the model's shapes are read once: progress lines ask for these numbers again and again.
    @functools.cached_property
    def steps(self) -> int:
        """Length of the run. Unit: steps."""
        return total_steps(self.config)

    @functools.cached_property
    def tokens(self) -> int:
        """Length of the run. Unit: tokens."""
        return samples_before(self.config.data, self.steps) * self.config.data.sequence_length

    @functools.cached_property
    def first_step(self) -> int:
        """Step that it starts at: 0, or that of the checkpoint it branches from, if that is there."""
        try:
            trunk = checkpoint_folders(Path(self.config.run.branch_from or os.devnull))[-1]
            return int(read_json(trunk / "checkpoint.json")["step"])
        except (MegagammaError, KeyError):
            return 0

    @functools.cached_property
    def flops(self) -> float:
        """Of its own steps, head and attention included. Unit: FLOPs."""
        data = self.config.data
        before = samples_before(data, min(self.first_step, self.steps)) * data.sequence_length
        return flops_per_token(self.sized.model, data.sequence_length) * (self.tokens - before)


def _embedded(config: Config) -> PrepareSettings:
    return embedded_settings(config.data.corpus, config.data.cache, vocab_size=config.tokenizer.vocab_size)


def vocabulary_of(config: Config) -> int | None:
    """Vocabulary of a config, from the option, the prepared data or the embedded text; None when it is not known."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    data = config.data
    if data.toy:
        from megagamma.toys.sources import toy_of  # brings in torch

        return toy_of(data).vocab_size
    folders = list(data.paths)
    if data.corpus:
        settings = _embedded(config)
        folders = [str(settings.output)]
        if not Path(folders[0], "manifest.json").is_file():
            return settings.vocabulary
    try:
        return int(read_manifest(folders[0])["tokenizer"]["vocab_size"])
    except DataError:
        return None


def embedded_folder(config: Config) -> str:
    """Folder in which the embedded text of a config is prepared."""
    return str(_embedded(config).output)


def data_places(config: Config) -> str:
    """Where the data of a config lies: points of one place have one `data_identity`."""
    data, tokenizer = config.data, config.tokenizer.vocab_size
    validation = sorted(config.validation.paths.items())
    toy = [data.toy, data.toy_options]
    return json.dumps([data.paths, data.corpus, data.cache, tokenizer, validation, config.run.branch_from, toy])


def data_identity(config: Config) -> list[Any]:
    """What the data of a config is, wherever it lies: checksums of token files and tokenizers, training data first.

    Raises:
        DataError: it is not prepared.
        CheckpointError: the checkpoint that run.branch_from names is not there.
    """
    identity: list[Any] = []
    if config.data.toy:
        from megagamma.toys.sources import fingerprint  # brings in torch

        identity.append(["toy", fingerprint(config.data)])
    folders = [embedded_folder(config)] if config.data.corpus else list(config.data.paths)
    entries = [["train", *folders], *([name, path] for name, path in sorted(config.validation.paths.items()))]
    for name, *paths in entries:
        if not paths:
            continue
        manifests = [read_manifest(path) for path in paths]
        files = [{key: entry["sha256"] for key, entry in sorted(m["files"].items())} for m in manifests]
        identity.append([name, files, [m["tokenizer"]["fingerprint"] for m in manifests]])
    if config.run.branch_from:
        try:
            trunk = checkpoint_folders(Path(config.run.branch_from))[-1]
        except CheckpointError as error:
            raise CheckpointError(f"run.branch_from={config.run.branch_from}: {error}") from error
        identity.append(["branch", file_digest(trunk / "checkpoint.json", "sha256")])
    return identity


def content_hash(config: Config, data: list[Any], as_given: bool = False) -> str:
    """What a point is: every option that its numbers depend on, and the content of its data. Hexadecimal.

    Names, folders, threads and what is printed do not count. Threads can move a number by rounding. Nor does the machine
    count: see `megagamma.scaling.collect.machine_warnings`.

    Args:
        as_given: tell 1 from 1.0 where an option takes both, as earlier versions did.
    """
    values = as_dict(config)
    for section, keys in _IRRELEVANT.items():
        for key in keys:
            values[section].pop(key, None)
    del values["dynamics"]  # it looks, and changes nothing
    for (section, key), default in _ADDED.items():
        if values[section][key] == default:
            del values[section][key]
    if not as_given:
        for section, options in values.items():
            if isinstance(options, dict):
                values[section] = {
                    key: _as_type(option_types()[f"{section}.{key}"], value) for key, value in options.items()
                }
    if config.deepspeed_config != "auto":
        values["deepspeed_config"] = read_json(config.deepspeed_config)
    text = json.dumps([1, values, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_type(kind: Any, value: Any) -> Any:
    """A value that fits a type of the schema, with whole numbers as floats where it takes floats."""
    if type(value) is int:
        return float(value) if kind is float or float in typing.get_args(kind) else value
    if isinstance(value, list | tuple):
        return [_as_type(kind, item) for item in value]
    if isinstance(value, dict):
        return {key: _as_type(kind, item) for key, item in value.items()}
    return value


def _base_values(sweep: Sweep) -> dict[str, Any]:
    """The config that every point starts from, its derived defaults still open."""
    arguments = [word for path in sweep.configs for word in ("--config", str(path))]
    values = as_dict(to_config(parse_namespace(build_parser(), arguments)))
    for name, value in sweep.options.items():
        set_option(values, name, value)
    values["logging"]["wandb_group"] = sweep.name
    return values


def _measures(config: Config, vocabulary: int) -> dict[str, float]:
    model = copy.deepcopy(config.model)
    model.vocab_size = vocabulary
    counts = parameter_counts(model)
    return {
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "parameters": counts.total,
        "non_embedding": counts.non_embedding,
        "flops_per_token": flops_per_token(model, config.data.sequence_length),
    }


def _measure_length(measures: dict[str, float], config: Config) -> None:
    data, ramp = config.data, config.data.batch_ramp
    if ramp is not None and not (len(ramp) == 3 and ramp[1] > 0 and 0 < ramp[0] <= data.global_batch_size):
        # Of a batch that a rule has not set yet, or an error that `validate` names.
        config = replace(config, data=replace(data, batch_ramp=None))
    measures["batch_tokens"] = data.global_batch_size * data.sequence_length
    measures["tokens"] = samples_before(config.data, total_steps(config)) * data.sequence_length


def expand(sweep: Sweep, folder: Path) -> list[Point]:
    """All points of a sweep, in the order of its axes, seeds last.

    Args:
        folder: of the sweep's points.

    Raises:
        ConfigurationError: a point that cannot work, by its name; an empty grid; two points that differ in nothing.
    """
    base = _base_values(sweep)
    points = []
    labels_of: dict[str, dict[str, str]] = {}
    for combination in itertools.product(*(axis.arms for axis in sweep.grid)):
        arms = {axis.name: arm for axis, arm in zip(sweep.grid, combination, strict=True)}
        labels = {axis: arm.label for axis, arm in arms.items()}
        if any(all(labels[name] == label for name, label in entry.items()) for entry in sweep.exclude):
            continue
        name = "-".join(labels.values()) or "point"
        if name in labels_of:
            first, second = (" x ".join(f"{k}={v}" for k, v in one.items()) for one in (labels_of[name], labels))
            raise ConfigurationError(f"{sweep.file}: points {first} and {second} are both named {name}: rename a label")
        labels_of[name] = labels
        try:
            point = _point(sweep, base, name, labels, arms)
        except ConfigurationError as error:
            raise ConfigurationError(f"{sweep.file}: point {name}: {error}") from error
        for seed in sweep.seeds:
            config = copy.deepcopy(point.config)
            config.run.seed = seed
            config.run.name = f"{name}-seed{seed}"
            config.run.folder = str(folder / config.run.name)
            points.append(replace(point, name=config.run.name, seed=seed, config=config))
    if not points:
        raise ConfigurationError(f"{sweep.file}: has no points: exclude leaves none: leave less out")
    _check_distinct(sweep, points)
    return points


def _point(sweep: Sweep, base: dict[str, Any], name: str, labels: dict[str, str], arms: dict[str, Arm]) -> Point:
    values = copy.deepcopy(base)
    launch: dict[str, Any] = dict(vars(sweep.launch))
    axis_values = {axis: arm.value for axis, arm in arms.items()}
    for arm in arms.values():
        for option, value in arm.options.items():
            set_option(values, option, value)
        launch |= arm.launch
    if launch["processes"] % launch["nodes"]:
        raise ConfigurationError(
            f"launch.nodes={launch['nodes']} must divide launch.processes={launch['processes']}: "
            f"{divisors(launch['processes'])}"
        )
    values["run"]["name"] = name
    shape = resolve(from_dict(copy.deepcopy(values)))
    vocabulary = vocabulary_of(shape) or ASSUMED_VOCABULARY
    measures = _measures(shape, vocabulary)
    _measure_length(measures, shape)
    rules = {option: arguments_for(rule, arms) for option, rule in sweep.rules.items()}
    if BUDGET in arms:
        rules["run.tokens"] = {"rule": "per_flops", "flops": arms[BUDGET].value}
    by_rule: dict[str, Any] = {}
    for option in in_order(rules, values["run"]["tokens"] is not None):
        where = f"rules.{option}: "
        size = Size(measures, labels)
        if option == "data.global_batch_size" and values["run"]["tokens"] is not None:
            # Of the tokens as they are asked for: whole steps of them follow from the batch.
            size = Size({**measures, "tokens": values["run"]["tokens"]}, labels)
        result: Any = apply_rule(option, rules[option], size, where)
        for axis in sweep.axes:
            factor = arms[axis.name].factor
            if factor is not None and axis.option == option:
                scaled: dict[str, Any] = {"rule": "constant", "value": result * factor}
                scaled |= {key: value for key, value in rules[option].items() if key in BOUNDS}
                result = apply_rule(option, scaled, size, where)
                axis_values[axis.name] = result
        by_rule[option] = result
        set_option(values, option, result)
        shape = resolve(from_dict(copy.deepcopy(values)))
        if option.startswith("model.") or option == "data.sequence_length":
            measures = _measures(shape, vocabulary)
        _measure_length(measures, shape)
    config = resolve(from_dict(values))
    validate(config, launch["processes"])
    tuned = tuple(axis.name for axis in sweep.axes if axis.is_tuned)
    return Point(name, labels, axis_values, 0, config, Launch(**launch), vocabulary, by_rule, tuned)


def _check_distinct(sweep: Sweep, points: list[Point]) -> None:
    seen: dict[str, str] = {}
    for point in points:
        # The data's place stands for its content here.
        identity = [data_places(point.config)]
        key = content_hash(point.config, identity)
        if key in seen:
            raise ConfigurationError(
                f"{sweep.file}: points {seen[key]} and {point.name} differ in nothing: their axes set options that change no "
                "run; leave one out (exclude), or change the axis"
            )
        seen[key] = point.name


def differing_options(a: Point, b: Point) -> list[str]:
    """Options in which two points differ, how they are started included, but for those that change no numbers."""
    first, second = as_dict(a.config), as_dict(b.config)
    found = []
    for section, values in first.items():
        if not isinstance(values, dict):
            found += [section] if values != second[section] else []
            continue
        skipped = {"run": ("name", "folder", "seed")}.get(section, ())
        found += [f"{section}.{key}" for key in values if key not in skipped and values[key] != second[section][key]]
    keys = ("processes", "nodes")
    return found + [f"launch.{key}" for key in keys if getattr(a.launch, key) != getattr(b.launch, key)]
