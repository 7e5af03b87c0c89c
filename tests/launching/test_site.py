"""Site files with and without mistakes, and snapshots of the code."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megagamma.errors import ConfigurationError
from megagamma.launching.sbatch_options import Option
from megagamma.launching.site import NAMES, load_site, site_file
from megagamma.launching.snapshot import snapshot
from megagamma.source import Source, source_of


def site(folder: Path, text: str) -> Path:
    path = folder / "site.sh"
    path.write_text(text)
    return path


def test_a_site_file_is_read_as_bash_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    path = site(
        tmp_path,
        "MEGAGAMMA_PARTITION=gpu\nexport MEGAGAMMA_ACCOUNT=$(echo mine)\nmodule load cuda\n"
        "export MEGAGAMMA_SIGNAL_SECONDS=120\nMEGAGAMMA_SBATCH='--gpus-per-node=8 --comment=\"a b\"'\n",
    )
    found = load_site(path)
    assert [str(option) for option in found.sbatch_options()] == [
        "--partition=gpu", "--account=mine", "--signal=B:USR1@120", "--gpus-per-node=8", "--comment=a b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("if true; then\n", "the site file is no valid bash"),
        ("export MEGAGAMMA_PARTITON=gpu\n", "is no variable of a site file: did you mean MEGAGAMMA_PARTITION?"),
        ("MEGAGAMMA_SIGNAL_SECONDS=2m\n", "MEGAGAMMA_SIGNAL_SECONDS=2m: must be a whole number of 1 or more"),
        ("MEGAGAMMA_TASKS_PER_NODE=0\n", "MEGAGAMMA_TASKS_PER_NODE=0: must be a whole number of 1 or more"),
        ("MEGAGAMMA_LAUNCHER=mpirun\n", "MEGAGAMMA_LAUNCHER=mpirun: use srun or deepspeed"),
        ('MEGAGAMMA_CONTAINER="apptainer exec --nv /gone.sif"\n', "there is no image /gone.sif"),
        ("MEGAGAMMA_PYTHON=/gone/python\n", "MEGAGAMMA_PYTHON=/gone/python: there is no such program"),
        ("MEGAGAMMA_ACCOUNT=a\nexit 1\n", "ends bash when it is sourced"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    path = site(tmp_path, text)
    with pytest.raises(ConfigurationError) as error:
        load_site(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAGAMMA_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert site_file() is None and load_site().sbatch_options() == []
    (tmp_path / "megagamma").mkdir()
    path = site(tmp_path / "megagamma", "")
    assert site_file() == path
    monkeypatch.setenv("MEGAGAMMA_SITE", str(tmp_path / "gone.sh"))
    with pytest.raises(ConfigurationError, match=r"gone.sh: there is no such file: copy launch/site.example.sh there"):
        site_file()


def test_the_example_is_valid_as_it_is_and_uncommented(tmp_path: Path, root: Path) -> None:
    example = (root / "launch" / "site.example.sh").read_text()
    assert load_site(site(tmp_path, example)).path is not None
    lines = [line.removeprefix("# ") for line in example.splitlines() if line.startswith(("# export", "# module"))]
    assert len(lines) > 10
    image = tmp_path / "megagamma.sif"
    image.touch()
    text = "\n".join(lines).replace("/images/megagamma.sif", str(image))
    assert Option("partition", "gpu") in load_site(site(tmp_path, text)).sbatch_options()


def checkout(folder: Path) -> Path:
    for name in ("megagamma/pretrain.py", "configs/a.yaml", "launch/x.sh", "pyproject.toml", "runs/big/metrics.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "megagamma" / "__pycache__").mkdir()
    (folder / "megagamma" / "__pycache__" / "pretrain.pyc").write_text("x")
    (folder / "launch" / "x.sh").chmod(0o755)
    return folder


def test_a_snapshot_is_made_once_per_content(tmp_path: Path) -> None:
    root, store = checkout(tmp_path / "code"), tmp_path / "store"
    with ThreadPoolExecutor(8) as threads:
        (first,) = {*threads.map(lambda _: snapshot(root, store), range(8))}
    assert [path.name for path in store.iterdir()] == [first.name], "nothing else is left"
    files = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert files == ["configs/a.yaml", "launch/x.sh", "megagamma/pretrain.py", "pyproject.toml", "snapshot.json"]
    assert (first / "launch" / "x.sh").stat().st_mode & 0o111
    (root / "runs" / "big" / "metrics.jsonl").write_text("more")
    assert snapshot(root, store) == first
    (root / "configs" / "a.yaml").write_text("edited")
    second = snapshot(root, store)
    assert second != first and (first / "configs" / "a.yaml").read_text() == "configs/a.yaml"
    with pytest.raises(ConfigurationError, match=r"holds no megagamma/pretrain.py"):
        snapshot(tmp_path, store)


def test_a_snapshot_keeps_its_commit(tmp_path: Path) -> None:
    """It lies inside the checkout, whose later commits it is not of."""
    root = checkout(tmp_path / "code")

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", str(root), *identity, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", "megagamma/pretrain.py", "configs")
    git("commit", "--quiet", "--message=first")
    first = git("rev-parse", "HEAD")
    clean = snapshot(root, root / "runs" / ".code")
    (root / "configs" / "a.yaml").write_text("edited")
    edited = snapshot(root, root / "runs" / ".code")
    git("commit", "--quiet", "--all", "--message=second")
    assert str(source_of(root)) == git("rev-parse", "HEAD") != first
    assert str(source_of(clean)) == first and str(source_of(edited)) == f"{first}+"
    # A copy of a copy is of the same commit; outside of a checkout there is none, also where the copy is inside of one.
    assert str(source_of(snapshot(edited, tmp_path / "again"))) == f"{first}+"
    assert source_of(snapshot(checkout(tmp_path / "plain"), root / "runs")) == Source(None, False)


def test_a_snapshot_of_this_code_runs(tmp_path: Path, root: Path) -> None:
    copy = snapshot(root, tmp_path)
    code = "import megagamma.launching.supervisor as it; print(it.__file__)"
    (copy / "snapshot.json").write_text('{"commit": "abc", "is_changed": true}')
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env={"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(copy / "megagamma" / "launching" / "supervisor.py")
    code = "from megagamma.runs.provenance import source_commit; print(source_commit())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env={"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "abc+", "what a run's provenance.json says"
