"""Stock tasks scored from a mirror: numbers against independent ones, what is kept, what fails, what is scored again."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.benchmarks import arc, byte_tokenizer, gsm8k, make_mirror, make_model, make_others, write_own_task

from megagamma.errors import EvaluationError
from megagamma.evaluation.harness import HuggingFaceOptions, evaluate
from megagamma.evaluation.scores import Scores
from megagamma.evaluation.tasks import TaskRequest

GROUP = """
group: pair
task: [own_easy, own_hard]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mirror and a model."""
    folder = tmp_path_factory.mktemp("harness")
    return make_mirror(folder / "mirror"), make_model(folder / "model")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Three tasks of one's own, one of which has an empty split, and a group of the other two."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, count in (("own_easy", 5), ("own_hard", 8), ("own_empty", 0)):
        write_own_task(folder, name, count)
    (folder / "pair.yaml").write_text(GROUP)
    return folder


def run(places: tuple[Path, Path], names: list[str], said: list[str] | None = None, **more: Any) -> Scores:
    request = TaskRequest(names, more.pop("include_path", None))
    options = {"content_hash": "weights-1", "mirror": places[0], "options": HuggingFaceOptions(device="cpu"), **more}
    lines = said if said is not None else []
    return evaluate(
        more.pop("model", places[1]) if "model" in more else places[1], request, say=lines.append, **options
    )


def loglikelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Computed here, without lm-eval. Unit: nats."""
    ids = tokenizer.encode(prompt + answer)
    start = len(tokenizer.encode(prompt))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(logits[place - 1, ids[place]] for place in range(start, len(ids))))


def close(found: dict[str, Any], values: list[float]) -> None:
    """A metric equals the mean of values, and its error their standard error."""
    array = numpy.array(values)
    assert found["value"] == pytest.approx(array.mean(), rel=1e-4)
    assert found["stderr"] == pytest.approx(array.std(ddof=1) / math.sqrt(len(array)), rel=1e-3)


def metrics(scores: Scores, task: str) -> dict[str, dict[str, Any]]:
    record = scores.record(task)
    assert record is not None
    return {one["metric"] + ("" if one["filter"] == "none" else f"@{one['filter']}"): one for one in record["metrics"]}


def test_numbers_are_those_of_the_formulas(places: tuple[Path, Path]) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(places[1]).eval()
    tokenizer = byte_tokenizer()
    found = metrics(run(places, ["arc_easy"]), "arc_easy")
    expected: dict[str, list[float]] = {name: [] for name in found}
    for doc in arc(12, 2):
        prompt, choices = f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"]
        gold = doc["choices"]["label"].index(doc["answerKey"])
        values = numpy.array([loglikelihood(model, tokenizer, prompt, f" {choice}") for choice in choices])
        normed = values / numpy.array([len(choice) for choice in choices])
        expected["acc"].append(float(values.argmax() == gold))
        expected["acc_norm"].append(float(normed.argmax() == gold))
        expected["choice_prob"].append(float(numpy.exp(values[gold]) / numpy.exp(values).sum()))
        expected["choice_prob_norm"].append(float(numpy.exp(normed[gold]) / numpy.exp(normed).sum()))
        expected["answer_nats_per_byte"].append(float(-values[gold] / len(f" {choices[gold]}".encode())))
    for name, values in expected.items():
        close(found[name], values)
    chance = numpy.mean([1 / len(doc["choices"]["text"]) for doc in arc(12, 2)])
    assert found["acc"]["chance"] == found["choice_prob"]["chance"] == pytest.approx(chance)
    # The three are told apart.
    assert abs(found["choice_prob"]["value"] - found["choice_prob_norm"]["value"]) > 1e-3
    assert [found[name]["higher_is_better"] for name in ("acc", "choice_prob", "answer_nats_per_byte")] == [1, 1, 0]


def test_loss_of_the_answer_of_a_generation_task(places: tuple[Path, Path]) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(places[1]).eval()
    tokenizer = byte_tokenizer()
    scores = run(places, ["gsm8k:0"], limit=4)
    found = metrics(scores, "gsm8k")
    assert {"exact_match@strict-match", "exact_match@flexible-extract", "answer_nats_per_byte"} == set(found)
    values = []
    for doc in gsm8k(4, 2):
        answer = f" {doc['answer']}"
        value = loglikelihood(model, tokenizer, f"Question: {doc['question']}\nAnswer:", answer)
        values.append(-value / len(answer.encode()))
    close(found["answer_nats_per_byte"], values)
    assert scores.record("gsm8k")["subsampled"] is True  # type: ignore[index]


def test_numbers_are_those_of_lm_eval(places: tuple[Path, Path]) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from megagamma.evaluation import compat, mirror

    with mirror.reading(places[0]):
        theirs = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(places[1])}, tasks=["arc_challenge"], num_fewshot=2, device="cpu",
            task_manager=TaskManager(include_path=str(compat.stock_folder() / "arc"), include_defaults=False),
            fewshot_random_seed=1234, batch_size=4,
        )["results"]["arc_challenge"]  # fmt: skip
    ours = metrics(run(places, ["arc_challenge:2"]), "arc_challenge")
    for name in ("acc", "acc_norm"):
        assert ours[name]["value"] == pytest.approx(theirs[f"{name},none"])
        assert ours[name]["stderr"] == pytest.approx(theirs[f"{name}_stderr,none"])
    # Examples in the prompt change the scores.
    assert metrics(run(places, ["arc_challenge"]), "arc_challenge")["answer_nats_per_byte"]["value"] != pytest.approx(
        ours["answer_nats_per_byte"]["value"]
    )


def test_every_kind_of_task_of_the_presets(tmp_path: Path) -> None:
    model, mirror = make_model(tmp_path / "model", window=96), make_others(tmp_path / "mirror")
    wanted = {
        "social_iqa": {"acc"}, "mmlu_anatomy": {"acc"}, "hellaswag": {"acc", "acc_norm"},
        "bbh_cot_fewshot_boolean_expressions": {"exact_match@get-answer"},
        "minerva_math_algebra": {"exact_match", "math_verify"}, "triviaqa": {"exact_match@remove_whitespace"},
    }  # fmt: skip
    scores = run((mirror, model), list(wanted), limit=2)
    assert scores.failures == {}
    for name, plain in wanted.items():
        found = metrics(scores, name)
        choices = {"choice_prob", "choice_prob_norm"} if "acc" in plain else set()
        assert set(found) == plain | choices | {"answer_nats_per_byte"}, name
        assert 0 < found["answer_nats_per_byte"]["value"] < 50


def strict(path: Path) -> Any:
    """JSON without NaN and infinity."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_is_kept(places: tuple[Path, Path], tmp_path: Path) -> None:
    import lm_eval
    import transformers

    scores = run(places, ["arc_easy:1", "arc_challenge"], output=tmp_path, limit=7)
    easy, hard = strict(tmp_path / "scores.json")["records"]
    assert [easy["task"], hard["task"]] == ["arc_easy", "arc_challenge"]
    assert (easy["fewshot"], easy["fewshot_source"], hard["fewshot"]) == (1, "asked for", 0)
    assert (easy["n"], easy["n_total"], easy["limit"], easy["subsampled"]) == (7, 12, 7, True)
    assert (easy["seed"], easy["identity"], easy["task_version"]) == (1234, "weights-1", "1.0")
    assert easy["versions"]["lm_eval"] == lm_eval.__version__
    assert easy["versions"]["transformers"] == transformers.__version__
    assert scores.records == [easy, hard]
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == 10
    row = next(row for row in rows if (row["task"], row["metric"]) == ("arc_easy", "acc"))
    assert float(row["value"]) == scores.value("arc_easy", "acc")
    assert float(row["stderr"]) > 0 and row["subsampled"] == "True" and row["n"] == "7"
    table = scores.table()
    assert "| arc_easy | 1 | 7* | acc |" in table and " +- " in table and "only a part" in table


def test_what_was_scored_is_skipped(places: tuple[Path, Path], tmp_path: Path) -> None:
    model = shutil.copytree(places[1], tmp_path / "model")
    here = (places[0], model)
    first = run(here, ["arc_easy"], output=tmp_path / "out", limit=3)
    assert first.new == ["arc_easy"]
    both = run(here, ["arc_easy", "arc_challenge"], output=tmp_path / "out", limit=3)
    assert both.new == ["arc_challenge"]
    assert both.record("arc_easy") == first.record("arc_easy")
    # Anything that a score depends on makes it another score.
    for names, more in (
        (["arc_easy:1"], {}),
        (["arc_easy"], {"limit": 4}),
        (["arc_easy"], {"seed": 7}),
        (["arc_easy"], {"content_hash": "weights-2"}),
        (["arc_easy"], {"options": HuggingFaceOptions(device="cpu", dtype="bfloat16")}),
        (["arc_easy"], {"again": True}),
    ):
        assert run(here, names, output=tmp_path / "out", **{"limit": 3, **more}).new == ["arc_easy"]
    assert len(strict(tmp_path / "out" / "scores.json")["records"]) == 7
    # Neither the model nor the data are needed when all is there.
    shutil.rmtree(model)
    there = run((tmp_path, model), ["arc_easy", "arc_challenge"], output=tmp_path / "out", limit=3)
    assert there.new == [] and [one["task"] for one in there.records] == ["arc_easy", "arc_challenge"]


@pytest.mark.parametrize("damage", ['{"format": 1, "rec', '{"format": 1, "records": [{"task": 1}]}', "[]", "\x00"])
def test_a_damaged_score_file(places: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    (tmp_path / "scores.json").write_text(damage)
    said: list[str] = []
    assert run(places, ["arc_easy"], said, output=tmp_path, limit=2).new == ["arc_easy"]
    assert any("WARNING" in line and "scores.json" in line and "set aside" in line for line in said)
    assert (tmp_path / "scores.json.damaged").read_text() == damage
    assert len(strict(tmp_path / "scores.json")["records"]) == 1


def test_a_task_that_fails_loses_nothing(places: tuple[Path, Path], own: Path, tmp_path: Path) -> None:
    said: list[str] = []
    names = ["own_easy", "own_empty", "own_hard"]
    scores = run(places, names, said, include_path=own, output=tmp_path / "out")
    assert [one["task"] for one in scores.records] == ["own_easy", "own_hard"]
    assert list(scores.failures) == ["own_empty"]
    assert "not scored: own_empty" in scores.table()
    assert any("[2/3] own_empty" in line and "eta" in line for line in said)
    assert [one["task"] for one in strict(tmp_path / "out" / "scores.json")["records"]] == ["own_easy", "own_hard"]
    # It is tried again, alone.
    (own / "own_empty.jsonl").write_text("".join(json.dumps(one) + "\n" for one in arc(3, 2)))
    scores = run(places, names, include_path=own, output=tmp_path / "out")
    assert scores.new == ["own_empty"] and not scores.failures


def test_a_plan_is_scored_without_planning_again(
    places: tuple[Path, Path], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megagamma.evaluation import harness
    from megagamma.evaluation.tasks import plan

    request = TaskRequest(["pair", "arc_easy:1"], own)
    options = {"content_hash": "w", "mirror": places[0], "options": HuggingFaceOptions(device="cpu"), "limit": 3}
    expected = evaluate(places[1], request, say=str, **options)
    ready = plan(request)
    monkeypatch.delattr(harness, "plan")
    for _ in range(2):  # a plan is not used up
        scores = evaluate(places[1], ready, say=str, **options)
        assert [one["task"] for one in scores.records] == ["own_easy", "own_hard", "arc_easy", "pair"]
        assert scores.flat() == expected.flat()


def test_a_kill_between_tasks_keeps_the_first(places: tuple[Path, Path], tmp_path: Path) -> None:
    def say(text: str) -> None:
        if text.startswith("[2/2]"):
            raise KeyboardInterrupt

    request = TaskRequest(["arc_easy", "arc_challenge"])
    options = HuggingFaceOptions(device="cpu")
    with pytest.raises(KeyboardInterrupt):
        evaluate(
            places[1], request, content_hash="w", mirror=places[0], output=tmp_path, limit=2, options=options, say=say
        )
    assert [one["task"] for one in strict(tmp_path / "scores.json")["records"]] == ["arc_easy"]


def test_groups(places: tuple[Path, Path], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the tasks name their files relative to their own folder
    scores = run(places, ["pair"], include_path=own)
    easy, hard, pair = (scores.record(name) for name in ("own_easy", "own_hard", "pair"))
    assert easy and hard and pair
    assert (pair["kind"], pair["n"], pair["members"], pair["task_version"]) == (
        "group",
        13,
        ["own_easy", "own_hard"],
        "N/A",
    )
    for name in ("acc", "choice_prob", "answer_nats_per_byte"):
        mean = (5 * scores.value("own_easy", name) + 8 * scores.value("own_hard", name)) / 13  # type: ignore[operator]
        assert scores.value("pair", name) == pytest.approx(mean)
    (own / "own_hard.jsonl").write_text("")
    scores = run(places, ["pair"], include_path=own)
    assert [one["task"] for one in scores.records] == ["own_easy"]
    assert scores.failures["pair"] == "1 of its 2 tasks have no score"


def test_a_small_window_is_told(places: tuple[Path, Path], tmp_path: Path) -> None:
    model = make_model(tmp_path / "small", window=64)
    record = run((places[0], model), ["gsm8k:2"], limit=2).record("gsm8k")
    assert record is not None
    assert (record["generation_capped"], record["prompts_cut"], record["answers_left_out"]) == (32, 2, 0)
    record = run(places, ["gsm8k:0"], limit=2).record("gsm8k")
    assert record is not None
    assert (record["generation_capped"], record["prompts_cut"]) == (None, 0)


def test_random_states_are_left_alone(places: tuple[Path, Path]) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    run(places, ["arc_easy:2"], limit=2)
    assert draw() == expected


def test_errors_come_before_the_model(places: tuple[Path, Path], tmp_path: Path) -> None:
    nowhere = (places[0], tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match=r"did you mean arc_easy"):
        run(nowhere, ["arc_easyy"])
    with pytest.raises(EvaluationError, match=r"Rowan/hellaswag .*fetch_benchmarks"):
        run(nowhere, ["arc_easy", "hellaswag"])
    with pytest.raises(EvaluationError, match=r"limit=0 must be a whole number"):
        run(nowhere, ["arc_easy"], limit=0)
    with pytest.raises(EvaluationError, match=r"limit=1.5 must be"):
        run(nowhere, ["arc_easy"], limit=1.5)
    with pytest.raises(EvaluationError, match=r"nowhere: not a Hugging Face model folder: config.json is missing"):
        run(nowhere, ["arc_easy"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_errors_about_devices(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match=r"device=cuda, but torch sees no GPU"):
        run(places, ["arc_easy"], options=HuggingFaceOptions(device="cuda"))
    with pytest.raises(EvaluationError, match=r"parallelize needs GPUs"):
        run(places, ["arc_easy"], options=HuggingFaceOptions(parallelize=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvaluationError, match=r"WORLD_SIZE=2 on a CPU"):
        run(places, ["arc_easy"])


def test_a_folder_that_cannot_be_loaded(places: tuple[Path, Path], tmp_path: Path) -> None:
    model = shutil.copytree(places[1], tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(EvaluationError, match=r"model=.*: cannot be loaded"):
        run((places[0], model), ["arc_easy"])
