"""Continuous metrics against numbers computed by hand, without a model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megagamma.evaluation.continuous import (
    answer_requests,
    choice_scores,
    from_choices,
    from_loglikelihoods,
    mean_and_error,
    softmax,
)


def test_softmax_of_values_far_below_zero() -> None:
    assert softmax([-1000.0, -1000.0 + math.log(3)]) == pytest.approx([0.25, 0.75])


def test_scores_of_one_document() -> None:
    scores = choice_scores([math.log(0.1), math.log(0.3)], ["ab", "abcd"], [1], [" ab", " abcé"])
    assert scores["choice_prob"] == pytest.approx(0.75)
    normed = [0.1**0.5, 0.3**0.25]
    assert scores["choice_prob_norm"] == pytest.approx(normed[1] / sum(normed))
    assert scores["answer_nats_per_byte"] == pytest.approx(-math.log(0.3) / 6), "bytes, not characters"


def test_several_right_choices() -> None:
    values = [math.log(0.2), math.log(0.3), math.log(0.5)]
    scores = choice_scores(values, ["a", "b", "c"], [0, 2], ["a", "b", "cccc"])
    assert scores["choice_prob"] == pytest.approx(0.7)
    assert scores["answer_nats_per_byte"] == pytest.approx(-math.log(0.5) / 4), "the answer with the fewest"


def test_mean_and_error() -> None:
    assert mean_and_error([2.0]) == (2.0, None)
    mean, error = mean_and_error([1.0, 2.0, 6.0])
    assert (mean, error) == (pytest.approx(3.0), pytest.approx(math.sqrt(7 / 3)))


class Task:
    """The part of a task that these functions read."""

    config = SimpleNamespace(doc_to_choice=None, target_delimiter=" ")

    def __init__(self, targets: list[Any], multiple_input: bool = False) -> None:
        self.targets, self.multiple_input = targets, multiple_input

    def doc_to_choice(self, doc: int) -> list[str]:
        return ["yes", "no"]

    def doc_to_target(self, doc: int) -> Any:
        return self.targets[doc]

    def doc_to_text(self, doc: int) -> Any:
        return 1

    def doc_to_prefix(self, doc: int) -> str:
        return ""


def request(doc: int, answer: str, value: float) -> Any:
    return SimpleNamespace(doc=doc, args=("prompt", answer), resps=[(value, False)], metadata=("task", doc, 1))


def test_documents_of_a_task() -> None:
    def documents(count: int) -> list[list[Any]]:
        # The third request of each, without the prompt, is for mutual information and must not count.
        return [[request(d, " yes", math.log(0.2)), request(d, " no", math.log(0.6)), request(d, "", 9.0)]
                for d in range(count)]  # fmt: skip

    scores = from_choices(Task([0, "no", [0, 1], -1, "hidden", 7]), documents(6))
    assert [one["choice_prob"] for one in scores] == pytest.approx([0.25, 0.75, 1.0]), "hidden labels are left out"
    assert [one["chance"] for one in scores] == [0.5, 0.5, 1.0]
    assert from_choices(Task([0], multiple_input=True), documents(1))[0]["choice_prob"] == pytest.approx(0.75)


def test_answers_of_a_task_that_generates() -> None:
    lm = SimpleNamespace(max_length=8, tok_encode=lambda text: list(text))
    task = Task(["five", ["six", "6"], "", [], "far too long", 7])
    instances = [[request(doc, "", 0.0)] for doc in range(6)]
    requests, dropped = answer_requests(task, instances, lm)
    assert [one.args for one in requests] == [("prompt", " five"), ("prompt", " six"), ("prompt", " 7")]
    assert dropped == 3
    scores = from_loglikelihoods(requests, [(-10.0, False), (-2.0, True), (-1.0, True)])
    assert [one["answer_nats_per_byte"] for one in scores] == [2.0, 0.5, 0.5]
