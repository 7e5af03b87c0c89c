"""The config: every option is described, every mistake in it is answered with what to do."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megagamma.config.bounds import Bounds, option
from megagamma.config.io import (
    _SYNONYMS,
    as_dict,
    build_parser,
    differences,
    from_dict,
    known_keys,
    load_config,
    parse_config,
    parse_namespace,
    save_config,
    to_config,
)
from megagamma.config.resolve import resolve, validate
from megagamma.config.schema import Config, ModelConfig, padded_vocab_size
from megagamma.errors import ConfigurationError

SMOKE = ["--config", "configs/smoke.yaml"]


@pytest.fixture(autouse=True)
def _in_the_source_tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """configs/smoke.yaml is named from there."""
    monkeypatch.chdir(root)


def complaint(*arguments: str, world_size: int = 1) -> str:
    """What is said about the smoke run with these arguments."""
    with pytest.raises(ConfigurationError) as caught:
        parse_config([*SMOKE, *arguments], world_size=world_size)
    text = str(caught.value)
    assert "\n" not in text
    assert "<class" not in text, "types are named in words"
    return text


def written(folder: Path, text: str | dict[str, Any]) -> str:
    path = folder / "options.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return str(path)


# -- every rule ------------------------------------------------------------------------------------------------

# (command line, processes, what the message must hold: the option, its value, and the remedy or the bound)
RULES: list[tuple[str, int, tuple[str, ...]]] = [
    ("--run.tokens 1e6", 1, ("run.steps=20", "run.tokens=1e+06", "give one of them")),
    ("--run.seed 18446744073709551616", 1, ("run.seed=18446744073709551616", "below 2^64")),
    ("--run.timeout_minutes .inf", 1, ("run.timeout_minutes=inf",)),
    ("--optimizer.betas [1.0,0.95]", 1, ("optimizer.betas[0]=1.0", "between 0 and 1 excluded")),
    ("--optimizer.betas [0.9,-0.1]", 1, ("optimizer.betas[1]=-0.1", "between 0 and 1")),
    ("--schedule.warmup_ratio 1.5", 1, ("schedule.warmup_ratio=1.5", "between 0 and 1")),
    ("--schedule.min_lr_ratio -1", 1, ("schedule.min_lr_ratio=-1", "between 0 and 1")),
    ("--schedule.decay_ratio 2", 1, ("schedule.decay_ratio=2", "between 0 and 1")),
    (
        "--schedule.shape wsd --schedule.warmup_ratio 0.6 --schedule.decay_ratio 0.5",
        1,
        ("schedule.warmup_ratio=0.6", "schedule.decay_ratio=0.5", "at most 1"),
    ),
    ("--init.gamma 5", 1, ("init.gamma=5", "between 0 and 4", "0.5 is the usual scale")),
    ("--init.mlp_down -0.5", 1, ("init.mlp_down=-0.5", "between 0 and 4")),
    ("--init.scheme megatron --init.head 0.5", 1, ("init.head=0.5", "init.scheme=megatron", "--init.scheme gamma")),
    ("--optimizer.lr_factors {embeding:2}", 1, ("'embeding' is not a role", "use embedding, ")),
    ("--optimizer.lr_factors {query:2}", 1, ("'query': 2.0", "query, key, value, gate", "the same")),
    ("--optimizer.lr_factors {mlp_up:2}", 1, ("'mlp_up': 2.0", "mlp_gate, mlp_up", "the same")),
    ("--optimizer.lr_factors {head:-1}", 1, ("optimizer.lr_factors", "head", "-1", "0 or more")),
    ("--model.num_query_groups 3", 1, ("model.num_query_groups=3", "model.num_attention_heads=4", "use 1, 2 or 4")),
    ("--model.num_attention_heads 3", 1, ("model.num_attention_heads=3", "hidden_size=64", "32 or 64")),
    ("--model.head_dim 17", 1, ("model.head_dim=17", "even", "use 18")),
    ("--model.qk_norm false", 1, ("model.attention_gate=elementwise", "--model.attention_gate none")),
    ("--data.corpus ''", 1, ("data.paths=[]", "data.corpus=''", "tools/prepare_data.py")),
    ("--data.paths [a]", 1, ("data.paths=['a']", "data.corpus='tiny'", "exactly one")),
    ("--data.weights [1,2]", 1, ("data.weights has 2 values for 1 paths", "one per path")),
    ("--data.weights [-1]", 1, ("data.weights=[-1.0]", "negative")),
    ("--data.weights [0]", 1, ("data.weights=[0.0]", "one must be positive")),
    ("--data.weights [.nan]", 1, ("data.weights=[nan]",)),
    ("--data.batch_ramp [4,4]", 1, ("data.batch_ramp=[4, 4]", "[start, increment, samples]")),
    ("--data.batch_ramp [2,0,100]", 1, ("data.batch_ramp=[2, 0, 100]", "positive")),
    ("--data.batch_ramp [2,4,100]", 1, ("start=2", "increment=4", "data.global_batch_size=8")),
    ("--data.batch_ramp [16,4,100]", 1, ("start=16", "data.global_batch_size=8")),
    ("--data.batch_ramp [1,1,100]", 2, ("data.batch_ramp start=1", "use 2")),
    ("--data.batch_ramp [2,3,100]", 2, ("data.batch_ramp increment=3", "use 4")),
    ("--data.global_batch_size 7 --data.micro_batch_size 2", 1, ("data.global_batch_size=7", "= 2", "use 8")),
    ("--data.global_batch_size 9", 2, ("data.global_batch_size=9", "2 data-parallel ranks = 2", "use 8")),
    ("--parallel.tensor 3", 3, ("parallel.tensor=3", "model.num_query_groups=4", "use 1, 2 or 4")),
    ("--parallel.tensor 4 --model.num_query_groups 2", 4, ("parallel.tensor=4", "model.num_query_groups=2", "use 1")),
    ("--parallel.tensor 4 --model.ffn_hidden_size 190", 4, ("parallel.tensor=4", "model.ffn_hidden_size=190")),
    ("--parallel.tensor 4 --model.vocab_size_multiple 6", 4, ("parallel.tensor=4", "model.vocab_size_multiple=6")),
    ("--parallel.pipeline 3", 3, ("parallel.pipeline=3", "model.num_layers=4", "use 1, 2 or 4")),
    ("--parallel.pipeline 2 --parallel.virtual_pipeline 3", 2, ("virtual_pipeline=3 = 6", "model.num_layers=4")),
    ("--parallel.virtual_pipeline 2", 1, ("parallel.virtual_pipeline=2", "parallel.pipeline of 2 or more")),
    ("--parallel.sequence true", 1, ("parallel.sequence=true", "parallel.tensor of 2 or more")),
    (
        "--parallel.sequence true --parallel.tensor 2 --data.sequence_length 63",
        2,
        ("data.sequence_length=63", "multiple of parallel.tensor=2"),
    ),
    ("--parallel.context 2", 2, ("parallel.context=2", "use 1")),
    ("--parallel.tensor 2", 3, ("parallel.tensor=2", "number of processes, 3", "a multiple of 2")),
    (
        "--parallel.pipeline 2 --parallel.virtual_pipeline 2 --data.global_batch_size 5",
        2,
        ("data.global_batch_size=5", "parallel.pipeline=2", "use 2 or a multiple"),
    ),
    (
        "--precision.dtype bf16 --deepspeed_config configs/deepspeed/zero0.json",
        1,
        ("precision.dtype=bf16", "configs/deepspeed/zero0.json", "use configs/deepspeed/zero1.json"),
    ),
    (
        "--parallel.pipeline 2 --deepspeed_config configs/deepspeed/zero2.json",
        2,
        ("configs/deepspeed/zero2.json", "ZeRO 2", "parallel.pipeline=2", "use ZeRO 0 or 1"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "processes", "parts"), RULES, ids=[rule[0] for rule in RULES])
def test_rule(arguments: str, processes: int, parts: tuple[str, ...]) -> None:
    words = ["" if word == "''" else word.replace(":", ": ") for word in arguments.split()]
    text = complaint(*words, world_size=processes)
    for part in parts:
        assert part in text


# Every bound of a single number: (option, a value just outside).
BOUNDS = {
    "run.steps": 0, "run.seed": -1, "run.threads": -1, "run.timeout_minutes": 0, "model.hidden_size": 0,
    "model.num_layers": 0, "model.num_attention_heads": 0, "model.num_query_groups": 0, "model.head_dim": 1,
    "model.ffn_hidden_size": 0, "model.vocab_size": 1, "model.vocab_size_multiple": 0, "model.norm_epsilon": 0,
    "model.rope_theta": 1, "init.std": 0, "init.truncate_at": 0, "init.max_z": 0, "data.sequence_length": 1,
    "data.global_batch_size": 0, "data.micro_batch_size": 0, "tokenizer.vocab_size": 1, "optimizer.lr": -0.1,
    "optimizer.eps": 0, "optimizer.weight_decay": -0.1, "optimizer.clip_grad": -1, "schedule.warmup_steps": -1,
    "parallel.tensor": 0, "parallel.pipeline": 0, "parallel.virtual_pipeline": 0, "parallel.context": 0,
    "checkpoint.interval": -1, "checkpoint.keep_last": -1, "validation.interval": -1, "validation.windows": -1,
    "guard.spike_sigma": 0, "guard.spike_window": 1, "guard.max_skips": -1, "logging.interval": 0,
    "logging.console_interval": 0, "logging.sample_interval": -1, "logging.sample_tokens": -1,
}  # fmt: skip


@pytest.mark.parametrize("option", BOUNDS)
def test_bound(option: str) -> None:
    text = complaint(f"--{option}", str(BOUNDS[option]))
    assert f"{option}={BOUNDS[option]}" in text
    assert "must be at least" in text or "must be more than" in text


def test_bound_of_the_token_budget() -> None:
    # Apart from the others: the smoke run has run.steps, which excludes it.
    assert "run.tokens=0.5 must be at least 1" in complaint("--run.steps", "null", "--run.tokens", "0.5")


def test_every_number_has_bounds() -> None:
    """A number that is added to the config and never checked would be missed by the two tables above."""
    assert unbounded(Config()) == {"data.weights", "data.batch_ramp", "optimizer.lr_factors"}, (
        "these have their own rules"
    )


def test_a_number_without_bounds_is_seen() -> None:
    """Negative control of the test above."""

    @dataclasses.dataclass
    class Section:
        checked: int = option(1, minimum=1)
        unchecked: int | None = None
        text: str = "1"

    @dataclasses.dataclass
    class Whole:
        section: Section = dataclasses.field(default_factory=Section)

    assert unbounded(Whole()) == {"section.unchecked"}


def unbounded(config: Any) -> set[str]:
    """Options of a number, or of several, without bounds."""
    return {
        f"{section.name}.{item.name}"
        for section in dataclasses.fields(config)
        if dataclasses.is_dataclass(values := getattr(config, section.name))
        for item in dataclasses.fields(values)
        if re.search(r"\b(int|float)\b", str(item.type)) and "bounds" not in item.metadata
    }


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "rule"),
    [
        ({"minimum": 1}, [1, 2], [0, float("inf"), float("nan")], "must be at least 1"),
        ({"above": 0}, [1e-9], [0, -1], "must be more than 0"),
        ({"minimum": 0, "maximum": 1}, [0, 0.5, 1], [-0.1, 1.1], "must lie between 0 and 1"),
        ({"minimum": 0, "below": 1}, [0, 0.5], [-0.1, 1], "must lie between 0 and 1 excluded"),
        ({"minimum": 0, "rule": "must be odd"}, [0], [-1], "must be odd"),
    ],
)
def test_bounds(bounds: dict[str, Any], inside: list[float], outside: list[float], rule: str) -> None:
    assert str(Bounds(**bounds)) == rule
    assert all(Bounds(**bounds).allow(value) for value in inside)
    assert not any(Bounds(**bounds).allow(value) for value in outside)


@pytest.mark.parametrize("value", ["-3", "-64"])
def test_negative_size_is_named_whatever_it_divides(value: str) -> None:
    # -64 is divisible by the 4 heads and -3 is not: one rule or the other must answer, in words.
    assert f"model.hidden_size={value} must be at least 1" in complaint("--model.hidden_size", value)


def test_transformer_engine_needs_its_package() -> None:
    import importlib.util

    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("the package is installed here")
    assert "model.transformer_engine=true" in complaint("--model.transformer_engine", "true")


def test_the_rules_accept_what_the_remedies_say() -> None:
    """Negative control: the same options with the values that the messages above offer."""
    parse_config([*SMOKE, "--data.global_batch_size", "8", "--data.micro_batch_size", "2"])
    parse_config([*SMOKE, "--model.num_query_groups", "2"])
    parse_config([*SMOKE, "--run.steps", "null", "--run.tokens", "1e6"])
    parse_config([*SMOKE, "--optimizer.lr_factors", "{query: 2, key: 2, value: 2, gate: 2}"])
    parse_config([*SMOKE, "--model.qk_norm", "false", "--model.allow_gate_without_qk_norm", "true"])
    parse_config([*SMOKE, "--data.batch_ramp", "[2, 2, 100]"], world_size=2)
    parse_config([*SMOKE, "--parallel.pipeline", "2", "--parallel.virtual_pipeline", "2"], world_size=2)


# -- unknown options and wrong types -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model.hiden_size", "64"), "model.hiden_size is not an option: did you mean model.hidden_size?"),
        (("--hidden_size", "64"), "hidden_size is not an option: did you mean model.hidden_size?"),
        (("--modle.num_layers", "2"), "modle.num_layers is not an option: did you mean model.num_layers?"),
        (("--model.hidden", "64"), "model.hidden is not an option: did you mean model.hidden_size?"),
        (("--qqq.zzz", "2"), "qqq.zzz is not an option: see --help"),
    ],
)
def test_unknown_knob_on_the_command_line(arguments: tuple[str, ...], said: str) -> None:
    assert said in complaint(*arguments)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": {"hiden_size": 64}}, "model.hiden_size is not an option: did you mean model.hidden_size?"),
        ({"modle": {"num_layers": 2}}, "modle.num_layers is not an option: did you mean model.num_layers?"),
        ({"learning_rate": 2}, "learning_rate is not an option: did you mean optimizer.lr?"),
    ],
)
def test_unknown_knob_in_a_file(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    assert said in complaint("--config", written(tmp_path, content))


@pytest.mark.parametrize("old", _SYNONYMS)
def test_synonym(old: str) -> None:
    assert _SYNONYMS[old] in known_keys()
    assert f"{old} is not an option: did you mean {_SYNONYMS[old]}?" in complaint(f"--{old}", "1")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--model.num_layers", "four"), ("model.num_layers", "four", "whole number")),
        (("--run.steps", "1.5"), ("run.steps", "1.5", "whole number")),
        (("--optimizer.lr", "fast"), ("optimizer.lr", "fast", "number")),
        (("--model.tie_embeddings", "perhaps"), ("model.tie_embeddings", "perhaps", "true or false")),
        (("--init.scheme", "xavier"), ("init.scheme", "xavier", "neox_small")),
        (("--optimizer.betas", "[0.9]"), ("optimizer.betas", "0.9", "2 elements")),
        (("--data.paths", "folder"), ("data.paths", "folder", "list")),
        (("--model.num_layers",), ("model.num_layers", "expected one argument")),
    ],
)
def test_wrong_type(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    text = complaint(*arguments)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("model: 3\n", ("model", "3")),
        ("model:\n  num_layers: few\n", ("model.num_layers", "few")),
        ("run:\n  name: 5\n", ("run.name", "5")),
        ("model: [\n", ("options.yaml",)),
        ("", ("options.yaml",)),
        ("- 1\n", ("options.yaml",)),
        ("run: 1: 2\n", ("options.yaml",)),
    ],
)
def test_unusable_file(tmp_path: Path, content: str, parts: tuple[str, ...]) -> None:
    text = complaint("--config", written(tmp_path, content))
    for part in parts:
        assert part in text


@pytest.mark.parametrize("form", [["--config", "missing.yaml"], ["--config=missing.yaml"]])
def test_missing_file(form: list[str]) -> None:
    assert "--config missing.yaml: there is no such file" in complaint(*form)


# -- which value wins ------------------------------------------------------------------------------------------


def test_later_file_wins_and_the_command_line_wins_over_files(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("run: {steps: 1, seed: 1, threads: 1}\n")
    second.write_text("run: {steps: 2, seed: 2}\n")
    found = parse_config([*SMOKE, "--config", str(first), "--config", str(second), "--run.steps", "3"]).run
    assert (found.steps, found.seed, found.threads, found.name) == (3, 2, 1, "smoke")
    swapped = parse_config([*SMOKE, "--config", str(second), "--config", str(first)]).run
    assert (swapped.steps, swapped.seed) == (1, 1)


def test_derived_defaults() -> None:
    config = resolve(Config(model=ModelConfig(hidden_size=100, num_attention_heads=10)))
    assert (config.model.num_query_groups, config.model.head_dim) == (10, 10)
    assert config.model.ffn_hidden_size == 320  # 266.7 up to a multiple of 64
    assert (config.run.steps, config.run.folder) == (1000, "runs/run")
    before = as_dict(config)
    assert as_dict(resolve(config)) == before
    with pytest.raises(ValueError, match="not known yet"):
        padded_vocab_size(config.model)
    config.model.vocab_size = 129
    assert padded_vocab_size(config.model) == 256


# -- files and back --------------------------------------------------------------------------------------------


def test_saved_config_loads_as_it_was(tmp_path: Path) -> None:
    arguments = [
        "--optimizer.lr_factors", "{embedding: 2.5}", "--checkpoint.permanent", "[1, 5]",
        "--data.batch_ramp", "[2, 2, 64]",
        "--optimizer.eps", "1e-10", "--run.steps", "null", "--run.tokens", "3e5", "--validation.paths", "{a: b}",
        "--logging.sample_prompt", "Über: 'alles' #1\n", "--init.gate", "0.25",
    ]  # fmt: skip
    config = parse_config([*SMOKE, *arguments])
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.optimizer.betas == (0.9, 0.95)
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config
    # Negative control: one changed option is seen, and only that one.
    again.optimizer.eps = 1e-9
    assert again != config
    assert differences(config, again, ("optimizer", "data")) == ["optimizer.eps: 1e-10 -> 1e-09"]


def test_unresolved_config_round_trip(tmp_path: Path) -> None:
    config = to_config(parse_namespace(build_parser(), [*SMOKE]))
    save_config(config, tmp_path / "config.yaml")
    assert resolve(config) == load_config(tmp_path / "config.yaml")


def test_print_config_reloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parse_config([*SMOKE, "--init.gamma", "0.7", "--print_config"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert load_config(written(tmp_path, text)) == parse_config([*SMOKE, "--init.gamma", "0.7"])
    assert "gamma: 0.7" in text


CONFIGS = Path(__file__).parents[2] / "configs"
# Sweeps have a form of their own, see tests/scaling.
SHIPPED = sorted(path for path in CONFIGS.glob("**/*.yaml") if path.parent.name != "sweeps")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_are_valid(path: Path) -> None:
    # A model's preset says nothing of data, which the rules ask for; nor does what stands beside another config.
    data = ["--data.corpus", "tiny"] if path.parent.name == "model" or path.stem == "short" else []
    validate(parse_config(["--config", str(path), *data]))


# -- the run's name and folder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(root: Path) -> Config:
    """Parsing takes longer than all that is checked here."""
    return parse_config(["--config", str(root / "configs" / "smoke.yaml")])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("run.folder", "", "run.folder='' must be the path of a folder"),
        ("run.folder", "   ", "run.folder='   ' must be the path of a folder"),
        ("run.folder", "runs/a\0b", "run.folder='runs/a\\x00b' must be the path of a folder"),
        ("run.folder", "runs/" + "x" * 256, "a file name 255: use a shorter one"),
        ("run.folder", "runs/" + "ü" * 128, "and a name of 256"),
        ("run.folder", "x/" * 2000, "run.folder='x/x/x/"),
        ("run.name", "", "run.name='' must be a plain name"),
        ("run.name", "  ", "must be a plain name"),
        ("run.name", ".", "must be a plain name"),
        ("run.name", "..", "must be a plain name"),
        ("run.name", "a/b", "run.name='a/b' must be a plain name, without / or control characters"),
        ("run.name", "../../elsewhere", "must be a plain name"),
        ("run.name", "a\0b", "must be a plain name"),
        ("run.name", "a\nb", "must be a plain name"),
        ("run.name", "\ud800", "must be a plain name"),
        ("run.name", "n" * 256, "has 256 bytes, a file name has at most 255"),
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_names_that_can_be_no_folder(smoke: Config, name: str, value: str, said: str) -> None:
    config = copy.deepcopy(smoke)
    setattr(config.run, name.removeprefix("run."), value)
    with pytest.raises(ConfigurationError) as caught:
        validate(resolve(config))
    text = str(caught.value)
    assert said in text
    assert "\n" not in text and len(text) < 300 and text.isprintable()


@pytest.mark.parametrize("name", ["run", "gamma 0.5", "größe", "a.b-c_d", "n" * 255, "..."])
def test_names_that_can_be_a_folder(smoke: Config, name: str) -> None:
    """Negative control, also with the longest name and the folder that follows from it."""
    config = copy.deepcopy(smoke)
    config.run.name, config.run.folder = name, "runs/{name}"
    validate(resolve(config))
    assert config.run.folder == f"runs/{name}"


def test_a_folder_without_a_name_is_refused_on_the_command_line() -> None:
    assert "run.folder='' must be" in complaint("--run.folder", "")
    assert "run.name='../up' must be" in complaint("--run.name", "../up")
