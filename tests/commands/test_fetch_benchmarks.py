"""Filling a mirror. There is no hub where tests run: `snapshot_download` copies from a folder that stands for it.

Everything else is real: names, patterns, the atomic move, and reading what was fetched.
"""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import huggingface_hub
import pytest
from support.benchmarks import make_mirror

from megagamma.commands import fetch_benchmarks
from megagamma.errors import ConfigurationError, EvaluationError
from megagamma.evaluation import mirror
from megagamma.owned import LIST


@pytest.fixture
def tool() -> ModuleType:
    return fetch_benchmarks


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the stand-in, whose repositories are those of the test mirror."""
    folder = make_mirror(tmp_path / "hub")
    (folder / "openai" / "gsm8k" / "script.py").write_text("print('never copied')")
    calls: list[Any] = []

    def snapshot_download(
        name: str, *, repo_type: str, revision: str | None, local_dir: str, allow_patterns: list[str]
    ) -> str:
        calls.append((name, revision))
        assert repo_type == "dataset"
        source = folder / name
        if not source.is_dir():
            raise FileNotFoundError(f"no repository {name}")
        for path in source.rglob("*"):
            inside = path.relative_to(source).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(inside, pattern) for pattern in allow_patterns):
                target = Path(local_dir) / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        return local_dir

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def files(folder: Path) -> set[str]:
    """Without the list of what was written."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith(LIST)}


def test_only_what_the_tasks_read(tool: ModuleType, hub: list[Any], tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "mirror"
    base = ["--mirror", str(root), "--tasks"]
    assert tool.main([*base, "arc_easy", "gsm8k", "--list"]) == 1
    assert capsys.readouterr().out.count("missing") == 2
    assert hub == []
    assert tool.main([*base, "arc_easy", "gsm8k", "--revision", "openai/gsm8k=abc"]) == 0
    assert set(hub) == {("allenai/ai2_arc", None), ("openai/gsm8k", "abc")}
    arc = root / "allenai" / "ai2_arc"
    splits = ("train", "validation", "test")
    assert files(arc) == {"README.md", *(f"ARC-Easy/{split}-00000-of-00001.parquet" for split in splits)}
    assert files(root / "openai" / "gsm8k") == {"main/train.jsonl", "main/test.jsonl"}
    assert not list(root.rglob("*.partial"))
    with mirror.reading(root):
        assert datasets.load_dataset("allenai/ai2_arc", "ARC-Easy")["test"].num_rows == 12
        assert datasets.load_dataset("openai/gsm8k", "main")["test"].num_rows == 6
    # Another config of the same set: it is missing, and fetched without losing the first.
    capsys.readouterr()
    assert tool.main([*base, "arc_challenge", "--list"]) == 1
    assert tool.main([*base, "arc_challenge"]) == 0
    assert len(files(arc)) == 7
    with mirror.reading(root):
        assert datasets.load_dataset("allenai/ai2_arc", "ARC-Easy")["test"].num_rows == 12
        assert datasets.load_dataset("allenai/ai2_arc", "ARC-Challenge")["test"].num_rows == 9
    # All there: nothing is asked of the hub.
    hub.clear()
    assert tool.main([*base, "arc_easy", "arc_challenge", "gsm8k"]) == 0
    assert hub == []
    assert tool.main([*base, "arc_easy", "arc_challenge", "gsm8k", "--list"]) == 0


def test_what_the_user_keeps_in_a_mirror_moves_along(tool: ModuleType, hub: list[Any], tmp_path: Path) -> None:
    """Also in a mirror of before, which has no list of what was written."""
    root = tmp_path / "mirror"
    arc = root / "allenai" / "ai2_arc"
    assert tool.main(["--mirror", str(root), "--tasks", "arc_easy"]) == 0
    (arc / LIST).unlink()
    (arc / "notes.txt").write_text("mine")
    (arc / "README.md").write_text((arc / "README.md").read_text() + "Mine.\n")
    assert tool.main(["--mirror", str(root), "--tasks", "arc_challenge"]) == 0
    assert (arc / "notes.txt").read_text() == "mine"
    assert len(files(arc)) == 8
    # The header has changed with the configs: the edited page stays beside.
    kept = root / "allenai" / "ai2_arc.kept-1"
    assert files(kept) == {"README.md"} and (kept / "README.md").read_text().endswith("Mine.\n")


def test_a_cut_download_leaves_nothing(
    tool: ModuleType, hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = huggingface_hub.snapshot_download

    def cut(*arguments: Any, **options: Any) -> str:
        whole(*arguments, **options)
        raise ConnectionError("the line went dead")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
    with pytest.raises(EvaluationError, match=r"openai/gsm8k cannot be had .*the line went dead"):
        tool.main(["--mirror", str(tmp_path / "mirror"), "--tasks", "gsm8k"])
    assert files(tmp_path / "mirror") == set()
    # What was there before stays.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
    assert tool.main(["--mirror", str(tmp_path / "mirror"), "--tasks", "arc_easy"]) == 0
    before = files(tmp_path / "mirror")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
    with pytest.raises(EvaluationError, match=r"went dead"):
        tool.main(["--mirror", str(tmp_path / "mirror"), "--tasks", "arc_challenge"])
    assert files(tmp_path / "mirror") == before


def test_errors(tool: ModuleType, hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(mirror.VARIABLE, raising=False)
    with pytest.raises(ConfigurationError, match=r"--mirror is missing"):
        tool.main(["--tasks", "gsm8k"])
    monkeypatch.setenv(mirror.VARIABLE, str(tmp_path))
    with pytest.raises(EvaluationError, match=r"did you mean gsm8k"):
        tool.main(["--tasks", "gsm8kk"])
    with pytest.raises(ConfigurationError, match=r"--revision openai/gsm8k: give"):
        tool.main(["--tasks", "gsm8k", "--revision", "openai/gsm8k"])
    with pytest.raises(ConfigurationError, match=r"--revision a/b: no task asked for reads it; they read openai/gsm8k"):
        tool.main(["--tasks", "gsm8k", "--revision", "a/b=1"])
    with pytest.raises(EvaluationError, match=r"lighteval/siqa cannot be had"):
        tool.main(["--tasks", "social_iqa"])


def test_the_real_client_without_a_network(tool: ModuleType, tmp_path: Path) -> None:
    # The environment of the tests says that the hub is not to be asked.
    with pytest.raises(EvaluationError, match=r"openai/gsm8k cannot be had .*needs a network"):
        tool.main(["--mirror", str(tmp_path), "--tasks", "gsm8k"])
    assert files(tmp_path) == set()
