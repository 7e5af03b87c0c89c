"""The console script: it lists the commands at once, runs them, and names the nearest to one that is not there."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagamma.cli import main_guard, source_tree
from megagamma.commands.__main__ import main, modules, summary
from megagamma.errors import ConfigurationError


def console(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megagamma.commands", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(modules())
    for line in lines:
        name, text = line.split(maxsplit=1)
        assert text == summary(modules()[name])
        assert len(text) > 20


def test_every_script_is_a_command(root: Path) -> None:
    scripts = {path.stem for path in (root / "tools").glob("*.py")}
    assert scripts | {"pretrain"} == set(modules())


@pytest.mark.parametrize("name", modules())
def test_every_command_says_what_it_is(name: str) -> None:
    module = importlib.import_module(modules()[name])
    assert callable(module.main)
    assert (module.__doc__ or "").splitlines()[0] == summary(modules()[name])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom megagamma.commands.__main__ import main\nmain(['--help'])\n"
        "print([name for name in ('torch', 'numpy', 'yaml', 'jsonargparse', 'argparse') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("prepare", "did you mean prepare_data?"),
        ("pretrian", "did you mean pretrain?"),
        ("chekpoint", "did you mean checkpoint?"),
        ("zzz", "use pretrain, analyze_run, "),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {word} is not a command: {hint}")
    assert said.count("\n") == 1


@pytest.mark.launcher
def test_a_command_gets_its_arguments_and_gives_its_exit_code(tmp_path: Path) -> None:
    prepared = console("prepare-data", "--corpus", "tiny", "--workers", "2", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert "data/tiny train: 45 documents" in prepared.stdout
    failed = console("checkpoint", "verify", "nowhere", cwd=tmp_path)
    assert (failed.returncode, failed.stderr) == (
        2,
        "error: nowhere: there is no such folder: give a checkpoint's, or a run's\n",
    )
    assert "usage: megagamma checkpoint verify" in console("checkpoint", "verify", "--help").stdout
    refused = console("pretrain", "--data.corpus", "tiny", "--run.steps", "0")
    assert (refused.returncode, refused.stderr) == (2, "error: run.steps=0 must be at least 1\n")
    assert console("pretrain", "--help").stdout.startswith("usage: megagamma pretrain ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megagamma {importlib.import_module('megagamma').__version__}\n"


def test_the_source_tree(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_tree() == root
    monkeypatch.setattr("megagamma.cli.__file__", str(tmp_path / "site-packages" / "megagamma" / "cli.py"))
    with pytest.raises(ConfigurationError, match=r"needs configs/ of the source tree, and .*site-packages has none"):
        source_tree()


@pytest.mark.parametrize("name", ["demo", "benchmark", "equality_matrix"])
def test_commands_that_need_the_source_tree_say_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megagamma.cli.__file__", str(tmp_path / "megagamma" / "cli.py"))
    module = importlib.import_module(modules()[name])
    assert main_guard(lambda: module.main(["train"] if name == "benchmark" else [])) == 2
    assert "this command needs configs/ of the source tree" in capsys.readouterr().err


def test_the_readme_has_the_exit_codes(root: Path) -> None:
    """One table, in megagamma.cli's docstring."""
    import megagamma.cli

    rows = [line for line in (megagamma.cli.__doc__ or "").splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [int(row.split("|")[1]) for row in rows] == [0, 1, 2, 3, 70, 75, 93, 130]
    readme = (root / "README.md").read_text()
    assert all(row in readme for row in rows)
