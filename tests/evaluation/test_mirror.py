"""A mirror stands for the hub: read offline, checked before any work, clear about what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from support.benchmarks import arc, make_mirror

from megagamma.errors import EvaluationError
from megagamma.evaluation import mirror


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mirror(tmp_path_factory.mktemp("mirror"))


def test_configs_of_a_header_and_of_folders(root: Path) -> None:
    original = datasets.load_dataset
    with mirror.reading(root):
        easy = datasets.load_dataset(path="allenai/ai2_arc", name="ARC-Easy")
        hard = datasets.load_dataset("allenai/ai2_arc", "ARC-Challenge", split="test", revision="main")
        math = datasets.load_dataset("openai/gsm8k", "main")
    assert datasets.load_dataset is original
    assert (easy["test"].num_rows, hard.num_rows, math["train"].num_rows) == (12, 9, 6)
    assert easy["test"][0]["question"].startswith("Which of these")


def test_no_stale_rows(tmp_path: Path) -> None:
    # `datasets` caches a set whose header names its configs by the folder's last name.
    import pyarrow
    import pyarrow.parquet

    def rows(root: Path) -> int:
        with mirror.reading(root):
            return int(datasets.load_dataset("allenai/ai2_arc", "ARC-Easy")["test"].num_rows)

    first, second = (make_mirror(tmp_path / name) for name in ("first", "second"))
    assert rows(first) == 12
    for root, count in ((second, 5), (first, 7)):
        file = root / "allenai" / "ai2_arc" / "ARC-Easy" / "test-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(arc(count, 2)), file)
        assert rows(root) == count


def test_wherever_the_program_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    found = mirror.find_mirror(root.name)
    assert found == root
    monkeypatch.chdir(tmp_path)
    with mirror.reading(found):
        assert datasets.load_dataset("openai/gsm8k", "main")["test"].num_rows == 6


def test_environment_and_argument(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(mirror.VARIABLE, raising=False)
    assert mirror.find_mirror() is None
    monkeypatch.setenv(mirror.VARIABLE, str(root))
    assert mirror.find_mirror() == root
    assert mirror.find_mirror(tmp_path) == tmp_path
    with pytest.raises(EvaluationError, match=r"mirror=.*nowhere: there is no folder .*fetch_benchmarks"):
        mirror.find_mirror(tmp_path / "nowhere")


def test_missing_sets_are_named_with_path_and_command(root: Path) -> None:
    wanted = [
        ("arc_easy", "allenai/ai2_arc", "ARC-Easy"),
        ("hellaswag", "Rowan/hellaswag", None),
        ("odd", "allenai/ai2_arc", "ARC-Odd"),
        ("own", "json", None),
    ]
    mirror.require(root, wanted[:1])
    with pytest.raises(EvaluationError) as caught:
        mirror.require(root, wanted)
    text = str(caught.value)
    assert str(root / "Rowan" / "hellaswag") in text
    assert f"tools/fetch_benchmarks.py --tasks hellaswag odd --mirror {root}" in text
    with pytest.raises(EvaluationError, match=r"--tasks knowledge --mirror"):
        mirror.require(root, wanted, ["knowledge"])
    assert "arc_easy" not in text and "own" not in text
    with mirror.reading(root, "hellaswag"), pytest.raises(EvaluationError, match=r"Rowan/hellaswag \(for hellaswag\)"):
        datasets.load_dataset("Rowan/hellaswag")
    mirror.require(None, wanted)


def test_a_damaged_set_is_named(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "org" / "set"
    folder.mkdir(parents=True)
    (folder / "test.parquet").write_bytes(b"PAR1 cut off")
    with (
        mirror.reading(tmp_path, "some_task"),
        pytest.raises(EvaluationError, match=r"some_task: org/set in .*cannot be"),
    ):
        datasets.load_dataset("org/set")


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # The environment of the tests says that the hub is not to be asked.
    with mirror.reading(None, "arc_easy"), pytest.raises(EvaluationError) as caught:
        datasets.load_dataset("allenai/no_such_set_here", "ARC-Easy")
    text = str(caught.value)
    assert "allenai/no_such_set_here" in text and "--tasks arc_easy" in text and "MEGAGAMMA_MIRROR" in text


def test_local_files_are_read_as_ever(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"x": 1}) + "\n")
    with mirror.reading(root):
        assert datasets.load_dataset("json", data_files=str(file))["train"][0] == {"x": 1}
        kept = datasets.load_dataset
    # A task's module that took the function by name goes on working, and reads no mirror.
    assert kept("json", data_files=str(file))["train"].num_rows == 1
    with pytest.raises((OSError, ValueError)):
        kept("openai/gsm8k", "no_such_config")
