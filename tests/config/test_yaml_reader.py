"""A config is read as it looks, within limits, or refused with the line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from megagamma.config.io import parse_config, save_config
from megagamma.config.yaml_reader import parse_yaml, write_quoted
from megagamma.errors import ConfigurationError
from megagamma.reading import Unreadable

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = [
    ("run: {steps: 1, seed: 2, steps: 3}", "'steps' is given twice (lines 1 and 1)"),
    ("run:\n  steps: 1\nmodel: {}\nrun:\n  seed: 2\n", "'run' is given twice (lines 1 and 4)"),
    ('run: {steps: 1, "steps": 3}', "'steps' is given twice"),
    (BOMB, "more than 20,000 values, aliases expanded"),
    ("x: &a [*a]", "*a in line 1 holds itself"),
    ("[" * 1_000_000, "nested deeper than 50 levels"),
    ("a: " + "[" * 51 + "]" * 51, "nested deeper than 50 levels"),
    ("x" * 2_000_000, "at most 1,048,576 are read"),
    ("a: [" + "1, " * 1001 + "]", "a list or mapping of more than 1,000 values"),
    ("a: !!python/object/apply:os.system [ls]", "tags are not read"),
    ("a: !!int 010", "tags are not read"),
    ("a: !mine 1", "tags are not read"),
    ("a: 1\n---\nb: 2", "a second document begins in line 2"),
    ("? [a]\n: 1", "a list or mapping as a key in line 1"),
    ("a: " + "9" * 5000, "a number of 5,000 digits in line 1"),
    ("a: [", "not YAML"),
    ("a: *b", "not YAML"),
    ("a: =", "not YAML"),
    ("a: \ud800", "not YAML"),
    ("a: \x01", "not YAML"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(Unreadable) as caught:
        parse_yaml(text)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-007", -7), ("0x10", 16), ("0b11", 3), ("1_000", 1000), ("+5", 5), ("0", 0),
        ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("0o10", "0o10"), ("2024-01-01", "2024-01-01"),
        ("1e-3", 0.001), ("1E5", 1e5), ("1.5", 1.5), (".5", 0.5), ("-.5e-2", -0.005), ("1e400", float("inf")),
        (".inf", float("inf")), ("true", True), ("null", None), ("", None), ("'010'", "010"), ("!!str 010", "010"),
        ("[1, {a: b}]", [1, {"a": "b"}]), ("\ufeffa: 1", {"a": 1}), ("---\na: 1\n...\n", {"a": 1}),
        ("{<<: {a: 1}, <<: {b: 2}, c: 3}", {"a": 1, "b": 2, "c": 3}), ("[&x [1], *x]", [[1], [1]]),
    ],
)  # fmt: skip
def test_values_are_read_as_they_look(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)
    assert parse_yaml(write_quoted(found)) == value


def test_numbers_of_yaml_1_1_are_what_this_guards_against() -> None:
    """Negative control: the library alone reads eight, ninety and the last of two keys."""
    assert yaml.safe_load("[010, 1:30, {a: 1, a: 2}]") == [8, 90, {"a": 2}]


def _config(folder: Path, text: str, *flags: str) -> Any:
    path = folder / "c.yaml"
    path.write_text(text)
    return parse_config(["--data.corpus", "tiny", "--config", str(path), *flags])


def test_a_config_holds_what_its_file_says(tmp_path: Path) -> None:
    found = _config(tmp_path, "run: {steps: 010, name: '1e-3'}\noptimizer: {lr: 1e-3}\nmodel.num_layers: 2\n")
    assert (found.run.steps, found.run.name, found.optimizer.lr, found.model.num_layers) == (10, "1e-3", 1e-3, 2)
    assert _config(tmp_path, "run: {name: 1:30}").run.name == "1:30"
    save_config(found, tmp_path / "saved.yaml")
    assert parse_config(["--config", str(tmp_path / "saved.yaml")]) == found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("run: {steps: 1:30}", "run.steps=1:30 must be a number"),
        ("optimizer: {lr_factors: {norm: 1:30}}", "optimizer.lr_factors={'norm': '1:30'} must be a number"),
        ("run.steps: 1\nrun: {steps: 2}", "run.steps is given twice"),
        ("config: other.yaml", "config is not an option"),
        ("run: {class_path: os.system}", "run.class_path is not an option"),
        ("run: other.yaml", "run is a section"),
        ("1: 2", "1 is not an option"),
        ("run: {1: 2}", "run.1 is not an option"),
        ("model: {num_layers: 100000000}", "model.num_layers=100000000 must be at most 10,000: no run is larger"),
        ("model: {hidden_size: 1000000000}", "must be at most 1,048,576"),
        ("model: {vocab_size: 1000000000000}", "must be at most 268,435,456"),
        ("run: {steps: 1000000000000000000}", "must be at most 1,000,000,000"),
        ("data: {sequence_length: 1000000000000}", "must be at most 134,217,728"),
        ("data: {global_batch_size: 100000000, micro_batch_size: 1, batch_ramp: [1, 1, 9]}", "at most 100,000 rises"),
        pytest.param("checkpoint: {permanent: [" + "1, " * 1_000_000 + "]}", "at most 1,048,576 are read", id="long"),
        ("run: {timeout_minutes: 1e14}", "must be at most 1,000,000"),
        ("optimizer: {lr: " + "9" * 300 + "}", "optimizer.lr="),
    ],
)  # fmt: skip
def test_a_config_that_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _config(tmp_path, text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--run.steps", "1:30"], "run.steps=1:30 must be a number"),
        (["--run.steps=1:30"], "run.steps=1:30 must be a number"),
        (["--optimizer.betas", "[1:30, 0.9]"], "must be a number"),
        (["--run.steps", "9" * 5000], "a number of 5,000 digits"),
        (["--run", "/dev/zero"], "a device, not a file"),
        (["--run", "os.path"], "run is a section"),
        (["--config", "/dev/zero"], "a device, not a file"),
        (["--checkpoint.permanent", f"{list(range(5000))}"], "checkpoint.permanent: Expected a list"),
        (["--optimizer.lr", "[" * 3000], "optimizer.lr: Expected a number"),
    ],
)
def test_a_command_line_that_is_refused(flags: list[str], reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_config(["--data.corpus", "tiny", *flags])
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_section_may_be_a_file_or_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("steps: 7\nname: '010'\n")
    config = parse_config(["--data.corpus", "tiny", "--run", str(tmp_path / "run.yaml"), "--run", "{seed: 3}"])
    assert (config.run.steps, config.run.name, config.run.seed) == (7, "010", 3)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigurationError, match="a FIFO, not a file"):
        parse_config(["--config", str(tmp_path / "fifo")])
