"""Reading JSON and text of strangers: bounded, strict, never waiting."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megagamma.checkpoint.manifest import read_manifest as read_checkpoint
from megagamma.checkpoint.manifest import stored_config
from megagamma.config.io import as_dict
from megagamma.config.schema import Config
from megagamma.errors import CheckpointError, MegagammaError
from megagamma.files import JsonLines, read_json
from megagamma.model.parameters import KINDS
from megagamma.reading import Unreadable, depth_above, parse_json, read_text

REFUSED = [
    ('{"a": 1, "b": 2, "a": 3}', '"a" is given twice'),
    ('{"a": 1,\n"b": 2,\n"a": 3}', "(lines 1 and 3)"),
    ('{"a": {"b": 1, "b": 1}}', '"b" is given twice'),
    ("[" * 100_000 + "]" * 100_000, "nested deeper than 100"),
    ("[" * 101 + "]" * 101, "nested deeper than 100"),
    ('{"a":' * 101 + "1" + "}" * 101, "nested deeper than 100"),
    ("9" * 5000, "a number of 5,000 digits"),
    ("0." + "1" * 5000, "a number of 5,002 digits"),
    ("[NaN]", "NaN: not a number of JSON"),
    ("[-Infinity]", "-Infinity: not a number of JSON"),
    ("[1e999]", "beyond the largest number"),
    ("", "not JSON"),
    ('{"a": 1', "not JSON"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(Unreadable) as caught:
        parse_json(text)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_is_json_is_read_as_it_is() -> None:
    value = {"a": [1, -2.5e-7, None, True, "x\n\u2028"], "b": {"a": 18446744073709551615}, "": []}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * 100 + "]" * 100) == json.loads("[" * 100 + "]" * 100)
    assert parse_json("[NaN, 1e999]", finite=False)[1] == float("inf")
    assert not depth_above([[1], {"a": [2]}], 3)
    assert depth_above([[1], {"a": [2]}], 2)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("x" * 101)
    (tmp_path / "latin").write_bytes(b"a\nb\xe9")
    for path, reason in (
        (tmp_path / "fifo", "a FIFO, not a file"),
        (tmp_path, "a folder, not a file"),
        (Path("/dev/zero"), "a device, not a file"),
        (tmp_path / "large", "101 bytes, where at most 100 are read"),
        (tmp_path / "latin", "not UTF-8 (byte 0xe9 in line 2)"),
        (tmp_path / "a\0b", "no name of a file"),
    ):
        with pytest.raises(Unreadable) as caught:
            read_text(path, limit=100)
        assert reason in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")
    (tmp_path / "mark").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "mark") == {"a": 1}
    os.symlink("nowhere", tmp_path / "dangling")
    for name in ("fifo", "dangling", "latin"):
        with pytest.raises(MegagammaError, match="cannot be read"):
            read_json(tmp_path / name)


def test_lines_that_nobody_wrote_are_left_out(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.path.write_text('{"step": 1}\n' + "[" * 100_000 + "\n" + "9" * 5000 + '\n{"step": "x"}\n{"step": 2}\n')
    assert lines.read() == [{"step": 1}, {"step": "x"}, {"step": 2}]
    lines.keep_until(1)
    assert lines.read() == [{"step": 1}]
    # What has no step that can be compared is kept apart, with what cannot be read.
    assert '{"step": "x"}' in lines.unreadable_file.read_text()


@pytest.mark.parametrize(
    ("section", "option", "value", "reason"),
    [
        ("model", "n_layers", 4, "model.n_layers is not an option of this version"),
        ("model", "num_layers", "4", "model.num_layers=4: must be a whole number"),
        ("model", "num_layers", 10**8, "model.num_layers=100000000 must be at most 10,000"),
        ("model", "num_layers", True, "model.num_layers=True: must be a whole number"),
        ("model", "attention_gate", "no", "model.attention_gate=no: must be one of none, elementwise, headwise"),
        ("optimizer", "betas", [0.9], "optimizer.betas=[0.9]: must be a list of 2 of a number"),
        ("optimizer", "lr_factors", {"query": "x"}, "must be a mapping of a number"),
        ("run", "steps", [], "run.steps=[]: must be a whole number or null"),
        ("data", "paths", "data/x", "data.paths=data/x: must be a list of text"),
        ("extra", "x", 1, "extra is not an option of this version"),
    ],
)
def test_a_checkpoint_whose_config_is_not_one(
    tmp_path: Path, section: str, option: str, value: object, reason: str
) -> None:
    config = as_dict(Config())
    manifest = {
        "version": 2, "step": 1, "adam_step": 1, "config": config, "consumed_samples": 1, "seconds": 1.0, "tokenizer": "",
        "progress": {}, "files": [
            {"file": f"{kind}.safetensors", "kind": kind, "bytes": 9, "xxh3_128": 32 * "f", "tensors": ["a"]}
            for kind in KINDS
        ],
    }  # fmt: skip
    path = tmp_path / "checkpoint.json"
    path.write_text(json.dumps(manifest))
    assert stored_config(tmp_path, read_checkpoint(tmp_path)).optimizer == Config().optimizer
    config.setdefault(section, {})[option] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as caught:
        stored_config(tmp_path, read_checkpoint(tmp_path))
    assert reason in str(caught.value)
