"""init.exponents: one mapping, in every spelling that a command line, a file or an older checkpoint may use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megagamma.config.io import (
    as_dict,
    current_form,
    differences,
    from_dict,
    load_config,
    parse_config,
    save_config,
)
from megagamma.config.schema import ROLES, Config, InitConfig
from megagamma.errors import ConfigurationError

TINY = ["--data.corpus", "tiny"]


def exponents(*arguments: str) -> dict[str, float]:
    return parse_config([*TINY, *arguments]).init.exponents


def write(folder: Path, name: str, **init: Any) -> str:
    path = folder / name
    path.write_text(yaml.safe_dump({"init": init}))
    return str(path)


def older_form(config: Config) -> dict[str, Any]:
    """What versions before init.exponents wrote to checkpoints and to config.yaml."""
    values = as_dict(config)
    given = values["init"].pop("exponents")
    values["init"] |= {role: given.get(role) for role in ROLES}
    return values


@pytest.mark.parametrize(
    "arguments",
    [
        ["--init.embedding", "0.5", "--init.head", "0"],
        ["--init.embedding=0.5", "--init.head=0"],
        ["--init.exponents.embedding", "0.5", "--init.exponents.head", "0"],
        ["--init.exponents", "{embedding: 0.5, head: 0}"],
        ["--init.exponents.embedding", "0.5", "--init.head", "0.0"],
        ["--init.embedding", "0.5", "--init.exponents", "{embedding: 0.5, head: 0}"],
        ["--init.embedding", "5e-1", "--init.head", "0"],
    ],
)
def test_every_spelling_on_the_command_line(arguments: list[str]) -> None:
    assert exponents(*arguments) == {"embedding": 0.5, "head": 0.0}


@pytest.mark.parametrize(
    "init",
    [
        {"embedding": 0.5, "head": 0},
        {"exponents": {"embedding": 0.5, "head": 0}},
        {"exponents": {"embedding": 0.5}, "head": 0, "query": None},
        {"exponents": {"embedding": 0.5, "head": 0}, "embedding": 0.5},
    ],
)
def test_every_spelling_in_a_file(tmp_path: Path, init: dict[str, Any]) -> None:
    path = write(tmp_path, "a.yaml", gamma=0.7, **init)
    config = parse_config([*TINY, "--config", path])
    assert (config.init.gamma, config.init.exponents) == (0.7, {"embedding": 0.5, "head": 0.0})


def test_the_rest_of_such_a_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    text = "optimizer: {lr: 1e-3}\nrun:\n  name: '007'\n  tokens: 1e9\n  steps: null\ninit: {gamma: 5e-1, key: 1e-1}\n"
    (tmp_path / "a.yaml").write_text(text)
    config = parse_config([*TINY, "--config", str(tmp_path / "a.yaml")])
    assert (config.optimizer.lr, config.run.name, config.run.tokens) == (1e-3, "007", 1e9)
    assert (config.init.gamma, config.init.exponents) == (0.5, {"key": 0.1})


def test_the_later_one_wins_role_by_role(tmp_path: Path) -> None:
    first = write(tmp_path, "1.yaml", embedding=0.1, query=0.1, key=0.1)
    second = write(tmp_path, "2.yaml", exponents={"query": 0.2, "key": 0.2})
    files = ["--config", first, f"--config={second}"]
    assert exponents(*files) == {"embedding": 0.1, "query": 0.2, "key": 0.2}
    assert exponents(*files, "--init.key", "0.3", "--init.key", "0.4") == {"embedding": 0.1, "query": 0.2, "key": 0.4}
    assert exponents("--init.key", "0.3", *files)["key"] == 0.2
    # null takes one back, in a file and on the command line, in either spelling.
    assert exponents(*files, "--init.key", "null", "--init.exponents.query", "null") == {"embedding": 0.1}
    assert exponents(*files, "--config", write(tmp_path, "3.yaml", embedding=None)) == {"query": 0.2, "key": 0.2}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--init.exponents.embeding", "0.5"], ("'embeding' is not a role", *ROLES)),
        (["--init.exponents", "{norm: 0.5}"], ("'norm' is not a role", *ROLES)),
        (["--init.embeding", "0.5"], ("init.embeding is not an option: did you mean init.embedding?",)),
        (["--init.head.x", "0.5"], ("init.head.x is not an option",)),
        (
            ["--init.head", "0.5", "--init.exponents.head", "0.6"],
            ("init.head=0.5", "init.exponents.head=0.6", "one of"),
        ),
        (
            ["--init.exponents", "{head: 0.6}", "--init.head=0.5"],
            ("init.head=0.5", "init.exponents.head=0.6", "one of"),
        ),
        (["--init.head", "wide"], ("init.head=wide", "number")),
        (["--init.head", "{"], ("init.head={", "number")),
        (["--init.head", "true"], ("init.head=True", "number")),
        (["--init.exponents", "3"], ("init.exponents=3", "{query: 0.5}")),
        (["--init.exponents.head", "5"], ("init.head=5", "between 0 and 4")),
        (["--init.head"], ("init.head",)),
    ],
)
def test_what_is_refused(arguments: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        exponents(*arguments)
    for part in parts:
        assert part in str(caught.value)


def test_a_file_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", exponents={"head": 0.6}, head=0.5)
    with pytest.raises(ConfigurationError, match=r"--config .*a\.yaml: init\.head=0\.5 and init\.exponents\.head=0\.6"):
        exponents("--config", path)


def test_print_config_has_one_spelling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        exponents("--config", write(tmp_path, "a.yaml", key=0.25), "--init.head", "0.5", "--print_config")
    init = yaml.safe_load(capsys.readouterr().out)["init"]
    assert init["exponents"] == {"key": 0.25, "head": 0.5}
    assert not set(ROLES) & set(init)


def test_an_older_run_loads_and_resumes_without_a_difference(tmp_path: Path) -> None:
    config = parse_config([*TINY, "--init.key", "0.25", "--init.gamma", "0.8"])
    older = older_form(config)
    assert older["init"]["key"] == 0.25 and older["init"]["query"] is None
    assert from_dict(older) == config
    assert older["init"]["key"] == 0.25, "what is stored is left alone"
    assert differences(from_dict(older), config, ("model", "init")) == []
    assert current_form(older) == as_dict(config) == current_form(as_dict(config))
    # The run's config.yaml of that version, with all roles, and an option of the command line after it.
    (tmp_path / "older.yaml").write_text(yaml.safe_dump(older))
    assert load_config(tmp_path / "older.yaml") == config
    later = exponents("--config", str(tmp_path / "older.yaml"), "--init.key", "0.5")
    assert later == {"key": 0.5}
    save_config(config, tmp_path / "new.yaml")
    assert load_config(tmp_path / "new.yaml") == config
    # Negative control.
    older["init"]["query"] = 0.5
    assert differences(from_dict(older), config, ("init",)) == [
        "init.exponents: {'query': 0.5, 'key': 0.25} -> {'key': 0.25}"
    ]


def test_a_stored_config_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"init\.key=0\.5 and init\.exponents\.key=0\.25"):
        from_dict({"init": {"exponents": {"key": 0.25}, "key": 0.5}})
    assert from_dict({}).init == InitConfig()
