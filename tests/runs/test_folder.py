"""A run's folder: what it is, and what each of its files gives back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megagamma.config.schema import Config, RunConfig
from megagamma.errors import DataError, MegagammaError
from megagamma.runs.folder import RunFolder, folder_name, is_checkpoint, is_run, kind_of_folder, steps_saved


def make_run(path: Path, steps: tuple[int, ...] = (20, 3)) -> RunFolder:
    """A folder with a config and finished checkpoints."""
    run = RunFolder(path)
    run.write_config(Config())
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "checkpoint.json").write_text("{}")
    return run


def test_names_of_checkpoints(tmp_path: Path) -> None:
    assert folder_name(1000) == "step_00001000"
    for name in ("step_00000010", "step_00000002", ".step_00000003.partial", "step_4", "step_000000005", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000006").write_text("a file")
    assert steps_saved(tmp_path) == [2, 10]
    assert steps_saved(tmp_path / "missing") == []


def test_checkpoints_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    assert (run.name, run.steps()) == ("demo", [3, 20])
    assert run.newest_checkpoint() == tmp_path / "demo" / "checkpoints" / "step_00000020"
    assert run.export(20) == tmp_path / "demo" / "hf" / "step_00000020"
    assert RunFolder(tmp_path / "other").newest_checkpoint() is None


def test_kind_of_each_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    exported = run.export(3)
    exported.mkdir(parents=True)
    (exported / "config.json").write_text("{}")
    bare = tmp_path / "copied" / "checkpoints" / folder_name(1)
    bare.mkdir(parents=True)
    renamed = tmp_path / "best"
    run.checkpoint(20).rename(renamed)
    kinds = {
        run.path: "run",
        run.checkpoints: "checkpoints",
        run.checkpoint(3): "checkpoint",
        renamed: "checkpoint",
        bare: "checkpoint",  # its checkpoint.json is lost: corrupt, but a checkpoint
        bare.parent: "checkpoints",
        bare.parent.parent: "run",  # without its config
        exported: None,  # named as a checkpoint
        run.config_file: None,
        tmp_path: None,
        tmp_path / "missing": None,
    }
    assert {path: kind_of_folder(path) for path in kinds} == kinds
    assert [is_run(path) for path in (run.path, bare.parent.parent, tmp_path)] == [True, False, False]
    assert [is_checkpoint(path) for path in (renamed, bare, exported)] == [True, False, False]


def test_kind_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    (run.checkpoint(3) / "checkpoint.json").unlink()
    monkeypatch.chdir(run.checkpoint(3))
    assert kind_of_folder(Path(".")) == "checkpoint", "by its name, which `.` does not show"


def test_run_of_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in (run.checkpoint(3), run.export(3)):
        owner = RunFolder.of_checkpoint(path)
        assert owner is not None and owner.path == run.path
    elsewhere = tmp_path / "run" / "backup" / folder_name(3)
    for path in (elsewhere, tmp_path / "copied" / "checkpoints" / folder_name(3)):
        assert RunFolder.of_checkpoint(path) is None


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not the folder of a run: config\.yaml is missing"):
        RunFolder(tmp_path).require_run()
    run = make_run(tmp_path)
    assert run.require_run() is run


def test_run_that_has_trained(tmp_path: Path) -> None:
    assert not RunFolder(tmp_path / "new").holds_steps
    assert make_run(tmp_path / "saved").holds_steps
    run = make_run(tmp_path / "started", steps=())
    assert not run.holds_steps
    run.metrics().write({"step": 1})
    assert run.holds_steps


def test_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    config = Config()
    config.init.gamma = 0.75
    run.write_config(config)
    run.write_resolved({"device": "cpu", "zero_stage": 1})
    run.write_provenance({"python": "3.11"})
    run.write_init_report({"roles": [1, 2]})
    (tmp_path / "tokenizer").write_bytes(b"model")
    run.write_tokenizer(tmp_path / "tokenizer")
    for lines, value in ((run.metrics(), 1), (run.events(), 2), (run.samples(), 3)):
        lines.write({"step": value})
        lines.close()
    assert run.read_config().init.gamma == 0.75
    assert run.read_resolved() == {"device": "cpu", "zero_stage": 1}
    assert run.read_provenance() == {"python": "3.11"}
    assert run.read_init_report() == {"roles": [1, 2]}
    assert run.tokenizer_file.read_bytes() == b"model"
    assert [file.read() for file in (run.metrics(), run.events(), run.samples())] == [
        [{"step": 1}],
        [{"step": 2}],
        [{"step": 3}],
    ]
    # The names are a format: other programs read them.
    assert sorted(path.name for path in run.path.iterdir()) == [
        "config.yaml", "events.jsonl", "init_report.json", "metrics.jsonl", "provenance.json", "resolved.json",
        "samples.jsonl", "tokenizer.model",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["resolved", "provenance", "init_report"])
def test_file_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(MegagammaError, match=rf"{name}\.json: cannot be read"):
        getattr(RunFolder(tmp_path), f"read_{name}")()


def test_reading_a_run_needs_no_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    code = (
        "import sys; from megagamma.runs.folder import RunFolder; from megagamma.runs import compare, lock\n"
        "RunFolder(sys.argv[1]).read_config()\n"
        "print([name for name in ('torch', 'megatron', 'deepspeed') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    assert subprocess.check_output(command, text=True) == "[]\n"


def test_a_config_written_by_hand_is_kept(tmp_path: Path) -> None:
    """A run writes its whole config under this name: the comments of a file of somebody's own would be lost."""
    run, text = RunFolder(tmp_path), "# mine\nrun: {name: mine}\n"
    for number, content in ((1, text), (2, "{")):
        run.config_file.write_text(content)
        assert run.write_config(Config()) == tmp_path / f"config.before-{number}.yaml"
        assert (tmp_path / f"config.before-{number}.yaml").read_text() == content
    # Negative control: what a run wrote is its own.
    assert run.write_config(Config()) is None
    assert len(list(tmp_path.iterdir())) == 3


def test_a_config_of_the_run_is_never_taken_for_one_written_by_hand(tmp_path: Path) -> None:
    """Also where a word is quoted that YAML would read as a number."""
    run = RunFolder(tmp_path)
    for name in ("plain", "1e-3", "010", "yes"):
        config = Config(run=RunConfig(name=name))
        run.write_config(config)
        assert run.write_config(config) is None
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
