"""Whatever stands in a config, on a command line, in a manifest, a checkpoint.json or a line of JSON: an answer of ours, or the
same meaning; never another exception. 990 cases here, 49,500 in `make test-all`; a command line takes a quarter second."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.prepared import MANIFEST

from megagamma.checkpoint.manifest import sealed
from megagamma.checkpoint.reader import read_manifest as read_checkpoint
from megagamma.config.io import as_dict, from_dict, known_keys, parse_config
from megagamma.config.resolve import validate
from megagamma.config.schema import Config
from megagamma.data.preparation.manifest import read_manifest
from megagamma.errors import CheckpointError, ConfigurationError, DataError
from megagamma.files import JsonLines
from megagamma.model.parameters import KINDS

CHECKPOINT = sealed({
    "format": "megagamma checkpoint", "version": 2, "step": 3, "adam_step": 3, "config": as_dict(Config()),
    "consumed_samples": 96, "seconds": 1.5, "tokenizer": "abc", "progress": {"guard": {"mean": 1.0}},
    "files": [
        {"file": f"{kind}-00000.safetensors", "kind": kind, "bytes": 9, "xxh3_128": 32 * "f", "tensors": ["a"]}
        for kind in KINDS
    ],
})  # fmt: skip


def cases(number: int) -> settings:
    """The same cases on every machine, as many as stated."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


both = pytest.mark.parametrize(
    "number", [pytest.param(1, id="some"), pytest.param(50, id="many", marks=pytest.mark.slow)]
)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 70), st.floats(), st.text(max_size=8),
    st.sampled_from(["010", "1:30", "1e-3", "no", "~", ".inf", "!!str", "*a", "&a", "<<", "2024-01-01", "9" * 400, "["]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(known_keys())


@st.composite
def mutated_json(draw: Any, original: dict[str, Any]) -> str:
    """A JSON object of which one thing is replaced, removed, added or repeated; or whose text has other characters in it."""
    value = copy.deepcopy(original)
    place: Any = value
    while True:
        inner = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(inner))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
            break
        place = place[key]
    action = draw(st.sampled_from(["replace", "remove", "add", "text", "cut"]))
    if action == "replace":
        place[key] = draw(values)
    elif action == "remove":
        del place[key]
    elif action == "add" and isinstance(place, dict):
        place[draw(st.text(max_size=6))] = draw(values)
    text = json.dumps(value)
    at = draw(st.integers(0, len(text)))
    if action == "text":
        words = ["{", "[", '"', ",", "\\", "NaN", "1e999", "9" * 5000, "[" * 2000, "\0", '"step": 1,', "\ufeff", "é"]
        return text[:at] + draw(st.sampled_from(words)) + text[at + draw(st.integers(0, 2)) :]
    return text[:at] if action == "cut" else text


def parsed(arguments: list[str]) -> Config | None:
    """The config of a command line, which satisfies every rule; None where it is refused in one line."""
    try:
        config = parse_config(arguments)
    except ConfigurationError:
        return None
    validate(config)
    return config


@both
def test_config_files(number: int, tmp_path: Path) -> None:
    """30 cases, 1,500 in `make test-all`: arbitrary values for options. What is accepted is what was written."""
    path = tmp_path / "c.yaml"

    @cases(30 * number)
    @given(st.lists(st.tuples(keys, values), max_size=3))
    def check(pairs: list[tuple[str, Any]]) -> None:
        written: dict[str, Any] = {}
        for key, value in pairs:
            section, dot, option = key.partition(".")
            if dot:
                written.setdefault(section, {})[option] = value
            else:
                written[key] = value
        try:
            path.write_text(yaml.safe_dump(written), encoding="utf-8", errors="surrogatepass")
        except (yaml.YAMLError, UnicodeError):
            return
        config = parsed(["--data.corpus", "tiny", "--config", str(path)])
        if config is None:
            return
        found = as_dict(config)
        for key, value in pairs:
            section, _, option = key.partition(".")
            if (
                key in ("model.num_query_groups", "model.head_dim", "model.ffn_hidden_size", "run.steps")
                and value is None
            ):
                continue  # a default follows from other options
            if isinstance(value, str | bool | int | float) and written.get(section, {}).get(option) is value:
                kept = found[section][option]
                # A number in quotes is one; a folder's name has the run's in it.
                assert kept == value or (isinstance(value, str) and str(kept) != value), (key, value, kept)

    check()


@both
def test_config_text(number: int, tmp_path: Path) -> None:
    """30 cases, 1,500 in `make test-all`: a real config with other bytes in it."""
    original = Path(__file__).parents[1].joinpath("configs", "smoke.yaml").read_bytes()
    path = tmp_path / "c.yaml"
    words = st.sampled_from([b"- ", b": ", b"*a", b"&a ", b"!!int ", b"{", b"[", b"'", b'"', b"\n", b"\t", b"---\n", b"\xff",
                             b"\x00", b"<<: ", b"? ", b"| ", b"%", b"0", b"1:30", b"[" * 3000, b"9" * 5000])  # fmt: skip

    @cases(30 * number)
    @given(st.integers(0, len(original)), st.integers(0, 5), words | st.binary(max_size=6))
    def check(at: int, cut: int, new: bytes) -> None:
        path.write_bytes(original[:at] + new + original[at + cut :])
        parsed(["--config", str(path)])

    check()


@both
def test_command_lines(number: int) -> None:
    """30 cases, 1,500 in `make test-all`."""

    @cases(30 * number)
    @given(st.lists(st.tuples(keys, values | st.text(max_size=12)), max_size=2), st.booleans())
    def check(pairs: list[tuple[str, Any]], equals: bool) -> None:
        arguments = ["--data.corpus", "tiny"]
        for key, value in pairs:
            text = value if isinstance(value, str) else json.dumps(value)
            arguments += [f"--{key}={text}"] if equals else [f"--{key}", text]
        # --print_config and the like are no keys of the config, but help may be asked for.
        with contextlib.suppress(SystemExit):
            parsed(arguments)

    check()


@both
def test_manifests(number: int, tmp_path: Path) -> None:
    """300 cases, 15,000 in `make test-all`: refused, or with all that is read of it."""
    path = tmp_path / "manifest.json"

    @cases(300 * number)
    @given(mutated_json(MANIFEST))
    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            found = read_manifest(tmp_path)
        except DataError:
            return
        assert found == json.loads(text.removeprefix("\ufeff"))
        assert found["dtype"] in ("uint16", "int32")
        for split in found["splits"]:
            assert {f"{split}.bin", f"{split}.idx"} <= set(found["files"])

    check()


@both
def test_checkpoint_manifests(number: int, tmp_path: Path) -> None:
    """300 cases, 15,000 in `make test-all`: refused, or the very same."""
    path = tmp_path / "checkpoint.json"
    path.write_text(json.dumps(CHECKPOINT))
    assert read_checkpoint(tmp_path) == CHECKPOINT  # the control: unchanged, it is read

    @cases(300 * number)
    @given(mutated_json(CHECKPOINT))
    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            found = read_checkpoint(tmp_path)
        except CheckpointError:
            return
        assert isinstance(from_dict(found["config"]), Config)
        # Without its checksum it is one of an earlier version, which is read with a warning.
        assert found == CHECKPOINT or found == {key: CHECKPOINT[key] for key in CHECKPOINT if key != "checksum"}

    check()


@both
def test_lines_of_json(number: int, tmp_path: Path) -> None:
    """300 cases, 15,000 in `make test-all`: lines that are intact are read, whatever was done to the others."""
    lines = [json.dumps({"step": step, "loss": 1.5, "text": "é\n"}) for step in range(4)]
    path = tmp_path / "metrics.jsonl"

    @cases(300 * number)
    @given(st.integers(0, 3), st.integers(0, 40), st.integers(0, 4), st.binary(max_size=5) | st.just(b"[" * 5000))
    def check(row: int, at: int, cut: int, new: bytes) -> None:
        new = new.replace(b"\n", b"").replace(b"\r", b"")
        whole = [line.encode() for line in lines]
        whole[row] = whole[row][:at] + new + whole[row][at + cut :]
        path.write_bytes(b"\n".join(whole) + b"\n")
        found = JsonLines(path).read()
        for number, line in enumerate(lines):
            assert number == row or json.loads(line) in found
        JsonLines(path).keep_until(10)
        assert all(json.loads(line) in JsonLines(path).read() for k, line in enumerate(lines) if k != row)

    check()


@pytest.mark.parametrize("kind", ["file", "folder", "empty", "fifo", "dangling", "newline", "bytes", "missing"])
def test_every_command_with_a_path_of_the_wrong_kind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, so that a hang or another exception is seen: exit code 2, one line."""
    import importlib

    from megagamma.cli import main_guard

    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    path = {"newline": "a\nb", "bytes": os.fsdecode(b"a\xff")}.get(kind, kind)
    if kind == "file":
        Path(path).write_text("[1")
    elif kind == "folder":
        (Path(path) / "x").mkdir(parents=True)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        os.symlink("nowhere", path)
    elif kind != "missing":
        Path(path).mkdir()
    commands = [
        ("pretrain", ["--config", path]),
        ("pretrain", ["--data.paths", json.dumps([path])]),
        ("pretrain", ["--data.corpus", "tiny", "--deepspeed_config", path]),
        ("commands.inspect_init", ["--config", path]),
        ("commands.checkpoint", ["inspect", path]),
        ("commands.checkpoint", ["verify", path]),
        ("commands.checkpoint", ["diff", path, path]),
        ("commands.compare_runs", [path]),
        ("commands.convert_and_eval", [path]),
        ("commands.convert_from_hf", [path, "--out", "out"]),
        ("commands.prepare_data", ["--verify", path]),
        ("commands.prepare_data", ["--inspect", path]),
    ]
    for module, words in commands:
        main = importlib.import_module(f"megagamma.{module}").main
        monkeypatch.setattr("sys.argv", [module, *words])
        try:
            code = main_guard(lambda main=main, words=words: main(words))
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr().err
        assert (code, said.count("error: ")) == (2, 1), (module, words, code, said)
        assert said.strip().count("\n") == 0, said
    assert not list(tmp_path.glob("crash-*"))
