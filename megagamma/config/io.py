"""Reading, printing and writing a `Config`: command line, YAML files, the copy in the run's folder.

The command line is built from the dataclasses of `megagamma.config.schema` by jsonargparse, so that an option
is described in one place only. Nothing here imports torch: `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse

from megagamma.config.exponents import flag_value, merge_exponents, take_exponents
from megagamma.config.resolve import resolve, validate
from megagamma.config.rules import check_bounds
from megagamma.config.schema import ROLES, Config
from megagamma.config.stored import config_of_sections
from megagamma.config.yaml_reader import parse_value, read_yaml, write_quoted, write_yaml
from megagamma.errors import ConfigurationError
from megagamma.reading import MAX_NUMBER_LENGTH, Unreadable

# Names of earlier or neighbouring tools, so that a user of those learns ours.
_SYNONYMS = {
    "model.n_layer": "model.num_layers",
    "model.n_head": "model.num_attention_heads",
    "model.rms_norm_eps": "model.norm_epsilon",
    "model.rmsnorm_eps": "model.norm_epsilon",
    "model.layernorm_epsilon": "model.norm_epsilon",
    "optimizer.learning_rate": "optimizer.lr",
    "optimizer.max_grad_norm": "optimizer.clip_grad",
    "parallel.tp": "parallel.tensor",
    "parallel.pp": "parallel.pipeline",
    "learning_rate": "optimizer.lr",
    "data.seq_length": "data.sequence_length",
    "run.max_steps": "run.steps",
}

# Characters of a name or value that a message repeats.
_SHOWN = 200

# Types in the words of a YAML file.
_WORDS = {
    "a typing.Literal": "one of ",
    "<class 'int'>": "whole number",
    "<class 'float'>": "number",
    "a <class 'bool'>": "true or false",
    "a <class 'str'>": "text (in quotes where it looks like a number)",
    "a <class 'list'>": "a list, such as [first, second]",
    "a <class 'dict'>": "a mapping, such as {name: value}",
    "<class 'NoneType'>": "null",
}


def known_keys() -> list[str]:
    """Every option as `section.key`, and the top-level ones."""
    keys = []
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            keys += [f"{name}.{item.name}" for item in dataclasses.fields(kind)]
        else:
            keys.append(name)
    return keys


def build_parser(program: str | None = None, description: str = "") -> jsonargparse.ArgumentParser:
    """The command-line parser whose schema is `Config`; programs may add arguments of their own to it."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("bounded_yaml", parse_value, (Unreadable,))
    parser = jsonargparse.ArgumentParser(
        prog=program,
        description=description,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
        parser_mode="bounded_yaml",
    )
    parser.add_argument("--config", action="config", help="YAML file of options; repeatable, later files win.")
    hints = get_type_hints(Config)
    for item in dataclasses.fields(Config):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            parser.add_class_arguments(kind, item.name)
        else:
            parser.add_argument(
                f"--{item.name}",
                type=kind,
                default=item.default,
                help="DeepSpeed's JSON file; its 'auto' values are filled from the options, contradictions are refused. "
                "auto: ZeRO 1, or ZeRO 0 for fp32 on one data-parallel rank, where there is nothing to shard.",
            )
    # The deepspeed launcher passes this to every process; the environment's LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, default=-1, help=jsonargparse.SUPPRESS)
    return parser


def _not_an_option(key: str) -> str:
    """What is said about an option that does not exist: the nearest that does."""
    key = key[:_SHOWN]
    near = _SYNONYMS.get(key)
    if near is None:
        keys = [*known_keys(), *(f"init.{role}" for role in ROLES)]
        matches = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
        if not matches:
            leaf = key.rsplit(".", 1)[-1]
            leaves = {name.rsplit(".", 1)[-1]: name for name in keys}
            matches = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
        near = matches[0] if matches else None
    hint = f"did you mean {near}?" if near else "see --help for every option"
    return f"{key} is not an option: {hint}"


def _explain(error: BaseException) -> str:
    """A parser's complaint as one sentence, with the nearest known option where a key is unknown."""
    text = " ".join(str(error).split())
    unknown = re.search(
        r"unrecognized arguments: -{0,2}([\w.\-]+)|Option '([^']+)' is not accepted"
        r"|Group '([^']+)' does not accept option '([^']+)'",
        text,
    )
    if unknown:
        flag, option, group, member = unknown.groups()
        return _not_an_option(f"{group}.{member}" if group else (flag or option))
    text = re.sub(r"Parser key \"?([\w.]+)\"?:", r"\1:", text)
    # An option that may be left out: of its two complaints only the one about the other type helps.
    text = re.sub(
        r"Does not validate against any of the Union subtypes .*Errors: - (.*?) - .*Given value: (.*)",
        r"\1, or null. Got value: \2",
        text,
    )
    for found, word in _WORDS.items():
        text = text.replace(found, word)
    # A value may be as long as a file.
    return text if len(text) <= 4 * _SHOWN else f"{text[: 2 * _SHOWN]} ... {text[-_SHOWN:]}"


def files_first(arguments: list[str] | None = None) -> list[str]:
    """A command line whose first words may be config files: `a.yaml b.yaml --run.steps 5` as `--config a.yaml ...`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return [*(item for word in words[:count] for item in ("--config", word)), *words[count:]]


def to_config(namespace: Any) -> Config:
    """A parsed jsonargparse namespace as a `Config`.

    Raises:
        ConfigurationError: null, which the parser takes for every option, where there must be a value.
    """
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        value = namespace[name]
        if dataclasses.is_dataclass(kind):
            value = value.as_dict() if hasattr(value, "as_dict") else dict(vars(value))
        values[name] = value
    return config_of_sections(values)


def read_sections(path: str) -> dict[str, Any]:
    """A config file's sections. Its form is checked here, naming the file; its values are the parser's matter.

    Raises:
        ConfigurationError: missing, not YAML, or not sections of options.
    """
    try:
        if not os.path.exists(path):
            raise ConfigurationError(f"--config {path}: there is no such file: give the path of a YAML file")
        values = read_yaml(path)
    except Unreadable as error:
        raise ConfigurationError(f"--config {path}: {error}: fix the file") from error
    except OSError as error:
        raise ConfigurationError(f"--config {path}: cannot be read ({error.strerror}): give a file that can") from error
    if not isinstance(values, dict):
        what = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigurationError(f"--config {path}: is {what}: give sections of options, such as 'run: {{steps: 10}}'")
    return _sections(values, f"--config {path}: ")


def _sections(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Sections of options, `run.steps: 10` as `run: {steps: 10}`.

    Raises:
        ConfigurationError: an option that does not exist, or that is given twice. The parser would take some of these for
            the name of a class, or of another file, to load.
    """
    names = {
        name: [item.name for item in dataclasses.fields(kind)]
        for name, kind in get_type_hints(Config).items()
        if dataclasses.is_dataclass(kind)
    }
    result: dict[str, Any] = {}
    for key, value in values.items():
        name, dot, option = key.partition(".") if isinstance(key, str) else (str(key), "", "")
        if name == "config" or not isinstance(key, str):
            raise ConfigurationError(f"{source}{_not_an_option(str(key))}")
        if name not in names:
            result[key] = value  # a program's own
            continue
        section = {option: value} if dot else value
        if not isinstance(section, dict):
            raise ConfigurationError(
                f"{source}{name}={str(value)[:_SHOWN]}: {name} is a section: give its options, such as "
                f"'{name}: {{{names[name][0]}: ...}}'"
            )
        for item in section:
            if str(item).partition(".")[0] not in [*names[name], *(ROLES if name == "init" else ())]:
                raise ConfigurationError(_not_an_option(f"{name}.{item}"))
            if item in result.get(name, {}):
                raise ConfigurationError(f"{source}{name}.{item} is given twice: keep one of them")
            _refuse_base_60(f"{name}.{item}", section[item], source)
        result[name] = {**result.get(name, {}), **section}
    return result


# YAML 1.1 takes 1:30 for ninety, and the parser would.
_BASE_60 = re.compile(r"(?<![\w.])[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?![\w:])")


def _refuse_base_60(name: str, value: Any, source: str = "") -> None:
    """Refuse 1:30 where a number belongs.

    Raises:
        ConfigurationError: naming the option.
    """
    section, _, key = name.partition(".")
    kind = get_type_hints(get_type_hints(Config).get(section, Config)).get(key.partition(".")[0])
    if ("int" in str(kind) or "float" in str(kind)) and _BASE_60.search(str(value)):
        raise ConfigurationError(f"{source}{name}={str(value)[:_SHOWN]} must be a number, and 1:30 is none: write 90")


def _own_arguments(arguments: list[str]) -> list[str]:
    """The command line as the parser takes it: its files and sections as text, all of init.exponents as one last argument.

    As everywhere, what comes later wins, and of init.exponents role by role.

    Raises:
        ConfigurationError: an unusable file, or two values for one role in one file or on the command line.
    """
    rest: list[str] = []
    exponents: dict[str, float] = {}
    flags: dict[str, Any] = {}
    sections = [name for name, kind in get_type_hints(Config).items() if dataclasses.is_dataclass(kind)]
    words = iter(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        value: str | None = text
        key, _, role = name.removeprefix("--init.").partition(".")
        is_exponent = name.startswith("--init.") and (key == "exponents" or (key in ROLES and not role))
        is_file = name == "--config" or (name.startswith("--") and name[2:] in sections)
        if not equals and (is_file or is_exponent):
            value = next(words, None)
        if value is None or not (is_file or is_exponent):
            if ":" in word:
                flag = name if equals else (rest[-1] if rest else "")
                _refuse_base_60(flag.removeprefix("--"), value if equals else word)
            rest.append(word)  # also a flag whose value is missing, which the parser names
        elif is_file:
            source = f"{name} {value[:_SHOWN]}: "
            if name == "--config":
                values = read_sections(value)
            else:
                values = _sections({name[2:]: _section_value(name, value)}, source)
            init = values.get("init")
            if init and {"exponents", *ROLES} & set(init):
                exponents = merge_exponents(exponents, take_exponents(init, source))
            rest += ["--config", write_quoted(values)]
        else:
            given = flag_value(value)
            section = {key: {role: given} if role else given}
            exponents = merge_exponents(exponents, take_exponents({**section}, "--"))
            if key == "exponents":
                section = {key: {**flags.get(key, {}), **section[key]}}
            flags |= section
            take_exponents({**flags}, "--")  # refuses two values for one role
    return [*rest, f"--init.exponents={json.dumps(exponents)}"] if exponents or flags else rest


def _section_value(name: str, value: str) -> Any:
    """A whole section on the command line: its options, or a file of them."""
    try:
        return read_yaml(value) if os.path.exists(value) else parse_value(value)
    except (Unreadable, OSError) as error:
        raise ConfigurationError(f"{name} {value[:_SHOWN]}: {error}: give its options, or a file of them") from error


def parse_namespace(parser: jsonargparse.ArgumentParser, arguments: list[str] | None = None) -> Any:
    """Parse, turning every complaint of the parser into a `ConfigurationError`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for word in arguments:
        if len(word) > MAX_NUMBER_LENGTH and (digits := re.search(rf"[0-9]{{{MAX_NUMBER_LENGTH},}}", word)):
            raise ConfigurationError(
                f"{word[: max(20, digits.start() + 20)][:_SHOWN]}...: a number of {len(digits[0]):,} digits: at most "
                f"{MAX_NUMBER_LENGTH} are read"
            )
    try:
        return parser.parse_args(_own_arguments(arguments))
    except (jsonargparse.ArgumentError, OverflowError, RecursionError) as error:
        raise ConfigurationError(_explain(error)) from error


@functools.cache
def _parser(program: str | None = None) -> jsonargparse.ArgumentParser:
    """Built once: it keeps nothing of what it has parsed, and reading the options' docstrings takes a while."""
    return build_parser(program, "Pretrain a GPT whose initialization is an option, with Megatron-core and DeepSpeed.")


def parse_config(arguments: list[str] | None = None, program: str | None = None, world_size: int = 1) -> Config:
    """Command line -> resolved and validated config.

    Args:
        arguments: the command line without the program's name; default `sys.argv[1:]`.
        program: name in `--help`.
        world_size: number of processes that the run has, for the rules about layouts.

    Raises:
        ConfigurationError: an unknown option, a bad value, or a rule between options that is broken.
    """
    config = resolve(to_config(parse_namespace(_parser(program), arguments)))
    validate(config, world_size)
    return config


def load_config(path: str | Path) -> Config:
    """Read a config file written by `save_config` (or by hand); resolved, not validated for a world size."""
    return resolve(to_config(parse_namespace(_parser(), [f"--config={path}"])))


def as_dict(config: Config) -> dict[str, Any]:
    """The config as plain dictionaries and lists, as YAML and JSON take it."""
    values = dataclasses.asdict(config)
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    return values


def current_form(values: dict[str, Any]) -> dict[str, Any]:
    """A stored config, as `as_dict` of this version would give it; a copy, as far as it changes.

    Before init.exponents, every role was a key of its own in the section `init`, null for init.gamma.
    """
    if not isinstance(values.get("init"), dict):
        return values
    init = dict(values["init"])
    exponents = merge_exponents({}, take_exponents(init, ""))
    return {**values, "init": {**init, "exponents": exponents}}


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `as_dict` gave, of this version or an older one. Keys that are not there take their defaults.

    Raises:
        ConfigurationError: an option that does not exist, or a value of another type or out of its bounds.
    """
    config = config_of_sections(current_form(values))
    check_bounds(config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the complete config as YAML, atomically; `load_config` gives the same config back."""
    from megagamma.files import write_text

    write_text(path, write_yaml(as_dict(config)))


def differences(old: Config, new: Config, sections: tuple[str, ...]) -> list[str]:
    """Options of `sections` that differ, as `section.key: old -> new`."""
    before, after = as_dict(old), as_dict(new)
    return [
        f"{section}.{key}: {before[section][key]} -> {after[section][key]}"
        for section in sections
        for key in after[section]
        if before[section].get(key) != after[section][key]
    ]
