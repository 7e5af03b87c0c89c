"""The whole way as a user goes it: runs -> Hugging Face folders -> scores -> tables, and what is refused on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.benchmarks import make_mirror
from support.exports import save_model
from support.processes import ROOT, environment
from support.ranks import RankPool

from megagamma.checkpoint.manifest import sealed
from megagamma.cli import main_guard
from megagamma.commands import convert_and_eval


@pytest.fixture
def tool() -> ModuleType:
    return convert_and_eval


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str) -> list[Path]:
    """Two runs, drawn with two exponents, of one and of two checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for gamma in ("0.5", "0.75"):
        given = ["--data.cache", data_cache, "--init.gamma", gamma]  # and the same run.name
        given += ["--data.sequence_length", "256"]
        path = folder / f"gamma{gamma}"
        one_rank.run(save_model, given, str(path))
        found.append(path)
    first = found[0] / "checkpoints"
    shutil.copytree(first / "step_00000007", first / "step_00000009")
    manifest = json.loads((first / "step_00000009" / "checkpoint.json").read_text())
    (first / "step_00000009" / "checkpoint.json").write_text(json.dumps(sealed(manifest | {"step": 9})))
    return found


def call(tool: ModuleType, capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main_guard(lambda: tool.main([str(one) for one in arguments]))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.launcher
def test_two_runs_to_tables(tool: ModuleType, runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    mirror = make_mirror(tmp_path / "mirror")
    arguments = [*runs, "--steps", "all", "--tasks", "arc_easy", "gsm8k:1", "--mirror", mirror, "--limit", "3"]
    code, out, err = call(tool, capsys, *arguments)
    assert code == 0, err
    assert out.count("parity (whole model): largest logit difference") == 3
    assert out.count("arc_easy | 0 | 3*") > 3
    folder = runs[0] / "hf" / "step_00000007"
    assert json.loads((folder / "parity.json").read_text())["holds"]
    for run, step in ((runs[0], 7), (runs[0], 9), (runs[1], 7)):
        scores = json.loads((run / "eval" / f"step_{step:08d}" / "scores.json").read_text())
        assert [record["task"] for record in scores["records"]] == ["arc_easy", "gsm8k"]
        assert [record["fewshot"] for record in scores["records"]] == [0, 1]
    table = (runs[0] / "eval" / "scores.md").read_text()
    assert table.strip() in out
    assert "0.75" in table and "arc_easy" in table and "gsm8k" in table
    assert (runs[0] / "eval" / "scores.png").stat().st_size > 5000
    # Again: nothing is converted or scored anew, and the table is the same.
    code, again, _ = call(tool, capsys, *arguments)
    assert code == 0 and table.strip() in again
    assert again.count("is this model already") == 3
    assert again.count("scored before: arc_easy, gsm8k") == 3
    # The Hugging Face folder by itself, and the checkpoint by itself, are the same model.
    code, _, err = call(tool, capsys, folder, "--tasks", "arc_easy", "--limit", "3", "--mirror", mirror)
    assert code == 0, err
    scored = json.loads((folder / "eval" / "scores.json").read_text())["records"][0]
    before = json.loads((runs[0] / "eval" / "step_00000007" / "scores.json").read_text())["records"][0]
    assert "Last checkpoint of each run" in out
    assert scored["metrics"] == before["metrics"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no such folder"),
        (["."], "holds no checkpoints/, no checkpoint.json and no config.json"),
        (["RUN", "--steps", "8"], "has no checkpoint of step 8: it has 7, 9"),
        (["RUN", "--steps", "soon"], "--steps soon: must be last, all, or whole numbers"),
        (["RUN", "--steps", "all", "--out", "OUT"], "2 models cannot go to one folder"),
        (["RUN", "--eval_only"], "convert it first, without --eval_only"),
        (["RUN", "--tasks", "arc_easy", "--limit", "0"], "limit=0.0 must be a whole number of documents"),
        (["RUN", "--tasks", "arc_easy", "--parallelize"], "parallelize needs GPUs"),
        (["RUN", "--tasks", "arc_easy", "--tokenizer", "none"], "add --convert_only"),
        (["RUN", "--tasks", "arc_easy", "--eval_out", "FILE"], "--eval_out"),
        (["RUN", "--convert_only", "--out", "FILE", "--overwrite"], "is a file: choose another folder"),
        (["RUN", "--convert_only", "--out", "RUN", "--overwrite"], "holds the checkpoint"),
        (["RUN", "--convert_only", "--out", "FULL", "--overwrite"], "holds files, and is no exported model"),
        (["RUN", "--convert_only", "--threads", "-1"], "--threads -1: must be 0 or more"),
        (["RUN", "--convert_only", "--device", "foo"], "device=foo: must be auto, cpu, cuda"),
        (["RUN", "--tasks", "arc_easi"], "did you mean arc_easy"),
        (["RUN", "--tasks", "arc_easy", "--mirror", "OUT"], "allenai/ai2_arc"),
        (["RUN", "--convert_only", "--max_shard_size", "big"], "must be a number of MB or GB"),
        (["RUN", "--convert_only", "--parity_tolerance", "0"], "--parity_tolerance 0.0: must be above 0"),
        (["RUN", "--convert_only", "--device", "cuda"], "torch sees no GPU here"),
        (["RUN", "--batch_size", "0"], "--batch_size 0: must be a whole number above 0"),
        (["RUN", "--convert_only", "--hf_class", "llama"], "use qwen3_5 or qwen3_next"),
        (["RUN", "--convert_only", "--tokenizer", "nowhere.model"], "nowhere.model"),
        (["HALF", "--convert_only"], "checkpoint.json is missing"),
    ],
)
def test_errors_before_any_work(
    tool: ModuleType, runs: list[Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    if "cuda" in arguments or "--parallelize" in arguments:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = tmp_path / "run"
    shutil.copytree(runs[0], run, ignore=shutil.ignore_patterns("hf", "eval"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    mirror = make_mirror(tmp_path / "mirror")
    monkeypatch.setenv("MEGAGAMMA_MIRROR", str(mirror))
    half = tmp_path / "half"
    shutil.copytree(run, half)
    for step in (7, 9):
        (half / "checkpoints" / f"step_{step:08d}" / "checkpoint.json").unlink()
    places = {
        "RUN": str(run),
        "OUT": str(tmp_path / "empty"),
        "HALF": str(half),
        ".": str(tmp_path / "empty"),
        "FILE": str(tmp_path / "file"),
        "FULL": str(tmp_path / "full"),
    }
    code, out, err = call(tool, capsys, *(places.get(one, one) for one in arguments))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert "weights" not in out + err
    assert not (run / "hf").exists()


@pytest.mark.slow  # tests/test_crashes.py stops a conversion at every file operation
@pytest.mark.launcher
def test_a_killed_conversion_leaves_nothing_that_looks_finished(
    tool: ModuleType, runs: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out" / "mine"
    command = [
        sys.executable, str(ROOT / "tools" / "convert_and_eval.py"), str(runs[1]), "--convert_only", "--out", str(output)
    ]  # fmt: skip
    partial = output.parent / ".mine.partial"
    # While the weights are written, and while they are compared.
    for file in ("model.safetensors", "tokenizer.json"):  # a parity of its own process takes seconds
        shutil.rmtree(partial, ignore_errors=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not (partial / file).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.0005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert partial.exists() and not output.exists()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (output / "parity.json").exists() and not partial.exists()
    assert [path.name for path in output.parent.iterdir()] == ["mine"]
