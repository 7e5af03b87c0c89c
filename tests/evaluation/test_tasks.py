"""Names of benchmarks: presets with pinned examples, nearest names, groups and tags, own tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagamma.errors import EvaluationError
from megagamma.evaluation.tasks import DEFAULT, PRESETS, YAML, TaskRequest, check, dataset_configs, describe, plan


def test_presets_are_the_papers_list() -> None:
    found = plan(TaskRequest(["reasoning", "knowledge"]))
    assert list(found.members) == [
        *("arc_challenge", "bbh", "social_iqa", "gsm8k", "minerva_math"),
        *("arc_easy", "triviaqa", "mmlu", "hellaswag"),
    ]
    assert (len(found.members["bbh"]), len(found.members["minerva_math"]), len(found.members["mmlu"])) == (27, 7, 57)
    assert len(found.tasks) == 7 + 27 + 7 + 57 - 1
    sets = dataset_configs(found)
    assert set(sets["allenai/ai2_arc"]) == {"ARC-Easy", "ARC-Challenge"}
    assert len(sets) == 8 and sets["Rowan/hellaswag"] == [None] and len(sets["cais/mmlu"]) == 57


def test_pinned_examples_are_what_lm_eval_says_today() -> None:
    pinned = {task: (count, source) for preset in PRESETS.values() for task, count, source in preset}
    found = plan(TaskRequest(list(pinned)))
    for name, (count, source) in pinned.items():
        members = [task for task in found.tasks if task.name in found.members[name]]
        assert {task.fewshot for task in members} == {count}, name
        own = {task.definition.yaml.get("num_fewshot") for task in members}
        assert own == ({None} if source == DEFAULT else {count}), name
    # Without the presets' pins the same comes out.
    for task in found.tasks:
        assert (task.fewshot_source in (YAML, DEFAULT)) and f"{task.fewshot}-shot" in " ".join(describe(found))


def test_examples_can_be_asked_for() -> None:
    found = plan(TaskRequest(["arc_easy:25", "mmlu:5", "gsm8k"]))
    by_name = {task.name: task.fewshot for task in found.tasks}
    assert (by_name["arc_easy"], by_name["mmlu_anatomy"], by_name["gsm8k"]) == (25, 5, 5)
    # A zero that is written in a task's YAML stays, as in lm-eval: such prompts hold their examples already.
    task = plan(TaskRequest(["arc_challenge_chat:5"])).tasks[0]
    assert task.fewshot == 0 and "not overruled" in task.fewshot_source


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("arc_esay", "arc_easy"),
        ("reasonning", "reasoning"),
        ("mmlu_anatomie", "mmlu_anatomy"),
        ("qqqqqqqq", "lm-eval ls"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        plan(TaskRequest(["arc_easy", name]))
    assert repr(name) in str(caught.value) and hint in str(caught.value)


def test_nothing_asked() -> None:
    with pytest.raises(EvaluationError, match=r"names nothing.*reasoning"):
        TaskRequest([" , "])


def test_a_task_asked_twice_in_two_ways() -> None:
    assert [task.name for task in plan(TaskRequest(["arc_easy", "arc_easy"])).tasks] == ["arc_easy"]
    with pytest.raises(EvaluationError, match=r"mmlu_\w+ is asked for with 0 and with 3"):
        plan(TaskRequest(["mmlu_stem", "mmlu:3"]))


def test_missing_data_are_told_for_all_tasks_at_once(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError) as caught:
        check(["quick", "gsm8k"], None, tmp_path)
    assert all(name in str(caught.value) for name in ("allenai/ai2_arc", "lighteval/siqa", "openai/gsm8k"))


def test_own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text(
        "task: arc_easy\ndataset_path: org/mine\noutput_type: multiple_choice\nnum_fewshot: 2\n"
    )
    found = plan(TaskRequest(["arc_easy", "gsm8k"], tmp_path))
    assert [(task.dataset, task.fewshot) for task in found.tasks] == [("org/mine", 2), ("openai/gsm8k", 5)]
    (tmp_path / "bad.yaml").write_text("task: [\n")
    with pytest.raises(EvaluationError, match=r"include_path: .*bad\.yaml"):
        TaskRequest(["arc_easy"], tmp_path)
    with pytest.raises(EvaluationError, match=r"holds no \.yaml"):
        TaskRequest(["arc_easy"], tmp_path / "nowhere")
