"""What can be known without torch is said before it is imported, by every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.prepared import MANIFEST

from megagamma.config.schema import Config
from megagamma.errors import CheckpointError, ConfigurationError, DataError, MegagammaError
from megagamma.preflight import check_early

# One process: imports are a matter of the process.
PROGRAM = """
import importlib, json, sys
from megagamma.cli import main_guard
for module, words in json.loads(sys.argv[1]):
    sys.argv = [module, *words]
    try:
        code = main_guard(lambda: importlib.import_module(module).main(words))
    except SystemExit as stopped:
        code = stopped.code
    heavy = [name for name in ("torch", "megatron", "deepspeed", "transformers") if name in sys.modules]
    print(json.dumps([code, heavy]), file=sys.stderr, flush=True)
"""


def prepared(folder: Path) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder


def test_errors_come_before_torch(tmp_path: Path) -> None:
    """Also the control: a command that has nothing to complain of imports torch."""
    data = str(prepared(tmp_path / "data"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("[" * 100_000)
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    paths = ["--data.paths", f"[{data}]"]
    train, command = "megagamma.pretrain", "megagamma.commands."
    cases: list[tuple[str, list[str], str]] = [
        (train, ["--config", "missing.yaml"], "--config missing.yaml: there is no such file"),
        (train, ["--config", "fifo"], "a FIFO, not a file"),
        (train, ["--model.hiden_size", "1"], "did you mean model.hidden_size?"),
        (train, [*paths, "--run.steps", "0"], "run.steps=0 must be at least 1"),
        (train, ["--data.paths", "[nowhere]"], "folder 'nowhere' does not exist"),
        (train, ["--data.paths", "[broken]"], "nested deeper than 100 levels"),
        (train, [*paths, "--validation.paths", "{a: nowhere}"], "folder 'nowhere' does not exist"),
        (train, [*paths, "--tokenizer.path", "none.model"], "tokenizer.path=none.model: there is no such file"),
        (train, [*paths, "--run.folder", "file/run"], "run.folder=file/run: cannot be written (Not a directory)"),
        (train, [*paths, "--run.folder", "x" * 300], "a name of 300"),
        (train, [*paths, "--run.folder", "new", "--run.resume", "must"], "run.resume=must"),
        (command + "checkpoint", ["verify", "nowhere"], "nowhere: there is no such folder"),
        (command + "checkpoint", ["inspect", "broken"], "holds no finished checkpoint"),
        (command + "checkpoint", ["verify"], "the following arguments are required: path"),
        (command + "compare_runs", ["nowhere"], "not the folder of a run"),
        (command + "convert_and_eval", ["nowhere"], "there is no such folder"),
        (command + "convert_and_eval", ["--nothing"], "unrecognized arguments: --nothing"),
        (command + "convert_from_hf", ["nowhere", "--out", "x"], "nowhere/config.json: cannot be read"),
        (command + "inspect_init", ["--config", "missing.yaml"], "there is no such file"),
        (command + "inspect_init", ["--model.num_layers", "100000000"], "must be at most 10,000"),
        (command + "prepare_data", ["--verify", "nowhere"], "folder 'nowhere' does not exist"),
        (command + "fetch_benchmarks", ["--nothing"], "the following arguments are required: --tasks"),
        (command + "equality_matrix", ["--nothing"], "unrecognized arguments"),
    ]
    control = (command + "inspect_init", ["--json", "out.json"])
    argument = json.dumps([*((module, words) for module, words, _ in cases), control])
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in done.stderr
    said, results = "", []
    for line in done.stderr.splitlines():
        if line.startswith("["):
            results.append((said, *json.loads(line)))
            said = ""
        else:
            said += line + "\n"
    assert len(results) == len(cases) + 1, done.stderr[-2000:]
    for (module, words, reason), (text, code, heavy) in zip(cases, results[:-1], strict=True):
        assert reason in text, (module, words, text)
        assert (code, heavy) == (2, []), (module, words)
    assert results[-1][1:] == (0, ["torch"])
    assert not (tmp_path / "new").exists(), "a check creates nothing"


def test_what_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    config = Config()
    config.data.paths = [str(prepared(tmp_path / "data"))]
    config.run.folder = str(tmp_path / "a" / "b" / "run")
    check_early(config, 1)
    assert not (tmp_path / "a").exists()
    config.run.resume = "must"
    with pytest.raises(CheckpointError):
        check_early(config, 1)
    check_early(config, 2)  # left to rank 0, whose answer all processes get
    (tmp_path / "a" / "b" / "run").mkdir(parents=True)
    (tmp_path / "a" / "b" / "run" / "metrics.jsonl").write_text("")
    config.run.resume = "never"
    with pytest.raises(ConfigurationError, match="holds a run already"):
        check_early(config, 1)
    config.run.resume, config.run.folder = "auto", "a\0b"
    with pytest.raises(MegagammaError, match="cannot be written"):
        check_early(config, 1)


def test_one_process_of_each_host_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.data.paths = ["nowhere"]
    for local_rank, says in (("0", True), ("3", False)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(DataError) as caught:
            check_early(config, 8)
        assert caught.value.on_one_rank is says
