"""Continuous metrics, which move before accuracy does: probability of the right choice, and loss of the right answer.

A small or young model answers at chance, and its accuracy shows nothing; these are continuous in the weights. With l_i the
log-likelihood of choice i given the prompt [nats], n_i its length in characters (as lm-eval's acc_norm takes it), g the
right choice, and b the length in UTF-8 bytes of the answer's text as it was scored, leading space included:

    choice_prob           exp(l_g) / sum_i exp(l_i)
    choice_prob_norm      exp(l_g / n_g) / sum_i exp(l_i / n_i)
    answer_nats_per_byte  -l_g / b

Each is the mean over documents, with the standard error s / sqrt(n), s the sample's standard deviation over n - 1. With
several right choices the probabilities add up, and the answer is the one with the fewest nats per byte. For tasks that
generate text, the answer is the target as lm-eval would write it into an example (of several, the first), scored right
after the prompt; with chain-of-thought prompts (bbh) that is the bare result without the steps before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NAMES = {"choice_prob": True, "choice_prob_norm": True, "answer_nats_per_byte": False}
"""The continuous metrics, and whether higher is better."""


def softmax(values: Sequence[float]) -> list[float]:
    """exp(v_i) / sum exp(v_j)."""
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def choice_scores(
    loglikelihoods: Sequence[float], choices: Sequence[str], right: Sequence[int], scored: Sequence[str]
) -> dict[str, float]:
    """The three scores of one document.

    Args:
        loglikelihoods: l_i. Unit: nats.
        choices: their texts, for n_i.
        right: indices of the right ones.
        scored: the texts whose log-likelihoods these are, for b.
    """
    plain = softmax(loglikelihoods)
    normed = softmax([value / max(len(text), 1) for value, text in zip(loglikelihoods, choices, strict=True)])
    return {
        "choice_prob": sum(plain[index] for index in right),
        "choice_prob_norm": sum(normed[index] for index in right),
        "answer_nats_per_byte": min(-loglikelihoods[index] / max(len(scored[index].encode()), 1) for index in right),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for the error of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def from_choices(task: Any, instances: list[list[Any]]) -> list[dict[str, float]]:
    """Scores of each document of a multiple-choice task that has been run, and `chance`, right over all choices.

    Args:
        task: of lm-eval.
        instances: the requests of each document, in order; their answers are in `resps`.
    """
    scores = []
    for requests in instances:
        doc = requests[0].doc
        choices = [str(choice) for choice in task.doc_to_choice(doc)]
        right = _right(task, doc, choices)
        if not right:
            continue
        # Unconditional requests for mutual information may follow.
        conditional = requests[: len(choices)]
        values = [float(request.resps[0][0]) for request in conditional]
        document = choice_scores(values, choices, right, [request.args[1] for request in conditional])
        scores.append({**document, "chance": len(right) / len(choices)})
    return scores


def _right(task: Any, doc: Any, choices: list[str]) -> list[int]:
    """Indices of the right choices; empty where the data name none, such as hidden labels."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    right = set()
    for answer in gold if isinstance(gold, list) else [gold]:
        index = choices.index(answer) if isinstance(answer, str) and answer in choices else answer
        if isinstance(index, int) and 0 <= index < len(choices):
            right.add(index)
    return sorted(right)


def answer_requests(task: Any, instances: list[list[Any]], lm: Any) -> tuple[list[Any], int]:
    """Requests for the log-likelihood of the right answer of each document of a task that generates text.

    Returns:
        The requests, and the number of documents left out: an empty answer, or one that is as long as the model's context
            length.
    """
    from lm_eval.api.instance import Instance

    answers, dropped = [], 0
    for requests in instances:
        doc, context = requests[0].doc, requests[0].args[0]
        target = task.doc_to_target(doc)
        if task.config.doc_to_choice is not None and isinstance(target, int):
            target = task.doc_to_choice(doc)[target]
        if isinstance(target, list):
            target = target[0] if target else ""
        delimiter = " " if task.doc_to_prefix(doc) else task.config.target_delimiter
        answer = f"{delimiter}{target}"
        if not str(target).strip() or len(lm.tok_encode(answer)) >= lm.max_length:
            dropped += 1
            continue
        answers.append(
            Instance(
                request_type="loglikelihood", doc=doc, arguments=(context, answer), idx=0, metadata=requests[0].metadata
            )
        )
    return answers, dropped


def from_loglikelihoods(requests: list[Any], answers: list[tuple[float, bool]]) -> list[dict[str, float]]:
    """Loss of each answer. Unit: nats per byte."""
    return [
        {"answer_nats_per_byte": -float(value) / max(len(request.args[1].encode()), 1)}
        for request, (value, _) in zip(requests, answers, strict=True)
    ]
