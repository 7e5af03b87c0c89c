"""A stranger's folder of tasks runs nothing before its author is trusted, and what it would run is listed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.benchmarks import write_own_task

from megagamma.commands import convert_and_eval, fetch_benchmarks
from megagamma.config.io import parse_config
from megagamma.errors import EvaluationError
from megagamma.evaluation.callback import check_harness
from megagamma.evaluation.continuation import _YAML
from megagamma.evaluation.trust import what_runs

DATA_ALONE = "task: plain\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_text: question\n"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Tasks that leave a file behind when any code of theirs runs."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    trace = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (folder / "utils.py").write_text(f"{trace}\ndef process(data):\n    return data\n")
    (folder / "base").write_text("process_docs: !function utils.process\n")
    (folder / "a.yaml").write_text("include: base\ntask: a\ndataset_path: json\noutput_type: multiple_choice\n")
    (folder / "b.yaml").write_text("group: b\ntask: [a]\nmetadata: {x: !function utils.process}\n")
    (folder / "c.yaml").write_text('task: c\ndataset_path: json\ndoc_to_text: "{{ cycler.__init__.__globals__ }}"\n')
    (folder / "d.yaml").write_text("task: d\nclass: !function os.system\n")
    (folder / "e.yaml").write_text("task: e\ndataset_path: pandas\ndataset_kwargs: {trust_remote_code: true}\n")
    return folder


def test_what_would_run_is_listed(hostile: Path) -> None:
    assert what_runs(hostile) == [
        "b.yaml: x calls utils.process of " + str(hostile / "utils.py"),
        "c.yaml: doc_to_text is a Jinja template, which can call Python",
        "d.yaml: class calls os.system of an installed module",
        "e.yaml: dataset_path pandas reads pickles",
        "e.yaml: trust_remote_code: true runs a script of a data set or a metric",
        "base: process_docs calls utils.process of " + str(hostile / "utils.py"),
    ]


def test_commands_refuse_it_before_anything_runs(hostile: Path, tmp_path: Path) -> None:
    include = ["--include_path", str(hostile)]
    config = parse_config(["--config", "configs/smoke.yaml", "--validation.harness_tasks", "[b]"])
    config.validation.harness_include_path = str(hostile)
    for action, option in (
        (lambda: convert_and_eval.main(["--list_tasks", "--tasks", "b", *include]), "--trust_tasks"),
        (lambda: fetch_benchmarks.main(["--tasks", "b", "--mirror", str(tmp_path / "m"), *include]), "--trust_tasks"),
        (lambda: check_harness(config), "--validation.trust_tasks true"),
    ):
        with pytest.raises(EvaluationError, match=r"utils\.process.*os\.system") as raised:
            action()
        assert option in str(raised.value) and raised.value.exit_code == 2
        assert not (tmp_path / "ran").exists()
    # Trusted, it does run: so the file is what shows it. lm-eval has no words for what the last two are.
    for name in ("d.yaml", "e.yaml"):
        (hostile / name).unlink()
    convert_and_eval.main(["--list_tasks", "--tasks", "b", *include, "--trust_tasks"])
    assert (tmp_path / "ran").exists()


def test_tasks_without_code_and_our_own_need_no_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain.yaml").write_text(DATA_ALONE)
    (tmp_path / "continuation.yaml").write_text(_YAML)
    assert what_runs(tmp_path) == []
    convert_and_eval.main(["--list_tasks", "--tasks", "plain", "continuation", "--include_path", str(tmp_path)])
    assert "plain: 0-shot" in capsys.readouterr().out
    # One changed byte, and it is no longer ours.
    (tmp_path / "continuation.yaml").write_text(_YAML.replace("{{context}}", "{{context }}"))
    assert what_runs(tmp_path) == ["continuation.yaml: doc_to_text is a Jinja template, which can call Python"]


def test_lm_evals_own_tasks_need_no_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_and_eval.main(["--list_tasks", "--tasks", "gsm8k"])
    assert "gsm8k: 5-shot" in capsys.readouterr().out
    write_own_task(tmp_path, "own", 2)
    assert what_runs(tmp_path), "templates of a task of one's own are listed too"


def test_files_that_never_end(tmp_path: Path) -> None:
    aliases = "".join(f"a{n}: &a{n} [{', '.join(['*a' + str(n - 1)] * 9)}]\n" for n in range(1, 40))
    (tmp_path / "bomb.yaml").write_text("a0: &a0 lol\n" + aliases)
    assert what_runs(tmp_path) == []
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 300 + "]" * 300)
    with pytest.raises(EvaluationError, match=r"deep\.yaml: nested deeper than 100"):
        what_runs(tmp_path)
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 100_000)
    with pytest.raises(EvaluationError, match=r"deep\.yaml"):
        what_runs(tmp_path)
