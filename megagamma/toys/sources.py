"""A toy as a run's data: a training source, and an evaluation set for each of its sets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megagamma.config.schema import Config, DataConfig
from megagamma.data.contracts import Batch, EvaluationSet
from megagamma.data.sources import RunData
from megagamma.data.text import keyed_permutation
from megagamma.errors import ConfigurationError
from megagamma.toys.anchor_kinds import AnchorKinds
from megagamma.toys.composite_anchors import CompositeAnchors
from megagamma.toys.condensation import Condensation
from megagamma.toys.contracts import Tokens, Toy
from megagamma.toys.permutations import Permutations

TOYS: Mapping[str, type[Any]] = {
    "composite_anchors": CompositeAnchors,
    "anchor_kinds": AnchorKinds,
    "permutations": Permutations,
    "condensation": Condensation,
}
"""By the names that `data.toy` takes."""


def toy_of(data: DataConfig) -> Toy:
    """The toy of a config.

    Raises:
        ConfigurationError: an option is not one of it, or of a wrong kind, or there are no such questions.
    """
    kind = TOYS[data.toy]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, value in data.toy_options.items():
        if name not in fields:
            raise ConfigurationError(
                f"data.toy_options: {name!r} is no option of {data.toy}: it has {', '.join(fields)}"
            )
        is_whole = fields[name].type in ("int", int)
        if is_whole and value != int(value):
            raise ConfigurationError(f"data.toy_options.{name}={value}: must be a whole number")
        values[name] = int(value) if is_whole else float(value)
    if values.get("test_samples") == 0:
        raise ConfigurationError("data.toy_options.test_samples=0: must be at least 1")
    try:
        toy: Toy = kind(**values)
    except ConfigurationError as error:
        raise ConfigurationError(f"data.toy={data.toy}, data.toy_options.{error}") from error
    return toy


def fingerprint(data: DataConfig) -> str:
    """Of the task: what a checkpoint resumes with, and what points of a sweep share."""
    text = json.dumps([1, data.toy, dataclasses.asdict(toy_of(data))], sort_keys=True)  # type: ignore[call-overload]
    return hashlib.sha256(text.encode()).hexdigest()


def _batch(tokens: Tokens, labels: Tokens, valid: np.ndarray | None = None) -> Batch:
    """Questions with a label at their last token alone."""
    count, length = tokens.shape
    targets, mask = torch.zeros(count, length, dtype=torch.int64), torch.zeros(count, length)
    targets[:, -1] = torch.from_numpy(np.ascontiguousarray(labels))
    mask[:, -1] = 1.0 if valid is None else torch.from_numpy(valid.astype(np.float32))
    return Batch(torch.from_numpy(np.ascontiguousarray(tokens)), targets, mask, torch.arange(length).repeat(count, 1))


class ToySource:
    """Training questions of a toy."""

    def __init__(self, toy: Toy, seed: int) -> None:
        self.toy, self.seed = toy, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def batch(self, ids: Sequence[int]) -> Batch:
        """Questions by number; a training set of fixed size is gone through in a new order each time."""
        numbers = np.asarray(ids, dtype=np.int64)
        if self.toy.samples:
            epochs, places = np.divmod(numbers, self.toy.samples)
            for epoch in np.unique(epochs):
                numbers[epochs == epoch] = self._order_of(int(epoch))[places[epochs == epoch]]
        tokens = self.toy.train(numbers, self.seed)
        return _batch(tokens, next(iter(self.toy.answers("train", tokens, self.seed).values())))

    def _order_of(self, epoch: int) -> Tokens:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, keyed_permutation(self.toy.samples, "toy", self.seed, epoch)
        return self._order


class ToyEvaluation:
    """One set of a toy. Scores: the loss of its first answer, and the share of questions answered in each named way."""

    needs: Literal["loss", "token_scores"] = "token_scores"

    def __init__(self, toy: Toy, name: str, seed: int) -> None:
        self.toy, self.name, self.seed = toy, name, seed
        self.size = toy.sets()[name]
        tokens = toy.questions(name, np.zeros(1, dtype=np.int64), seed)
        self.named = tuple(toy.answers(name, tokens, seed))
        self.sums: tuple[str, ...] = ("nats", "questions", *self.named)

    def batch(self, ids: Sequence[int]) -> Batch:
        """Questions by number; those past the end have no label."""
        numbers = np.asarray(ids, dtype=np.int64)
        valid = numbers < self.size
        tokens = self.toy.questions(self.name, np.where(valid, numbers, 0), self.seed)
        return _batch(tokens, self.toy.answers(self.name, tokens, self.seed)[self.named[0]], valid)

    def measure(self, batch: Batch, output: Tensor) -> Tensor:
        """See `sums`."""
        valid = batch.loss_mask[:, -1].double()
        said = output[:, -1, 1]
        answers = self.toy.answers(self.name, batch.tokens.cpu().numpy(), self.seed)
        counts = [
            ((said == torch.from_numpy(answer).to(said.device)).double() * valid).sum() for answer in answers.values()
        ]
        return torch.stack([(-output[:, -1, 0].double() * valid).sum(), valid.sum(), *counts])

    def scores(self, sums: Tensor) -> dict[str, float]:
        """Nats per question, and shares."""
        nats, questions, *counts = sums.tolist()
        return {
            "loss": nats / questions,
            **{name: count / questions for name, count in zip(self.named, counts, strict=True)},
        }

    def describe(self, scores: dict[str, float], sums: Tensor) -> str:
        """As a phrase."""
        shares = ", ".join(f"{name} {scores[name]:.1%}" for name in self.named)
        return f"{shares} of {int(sums[1])} questions, loss {scores['loss']:.4f}"


def open_toy(config: Config) -> RunData:
    """The data of a run on a toy.

    Raises:
        ConfigurationError: see `toy_of`; or the config's length or vocabulary is not the toy's.
    """
    toy, seed = toy_of(config.data), config.run.seed
    if config.data.sequence_length != toy.length:
        raise ConfigurationError(
            f"data.sequence_length={config.data.sequence_length} must be the {toy.length} tokens of a question of "
            f"data.toy={config.data.toy}"
        )
    if config.model.vocab_size is not None and config.model.vocab_size < toy.vocab_size:
        raise ConfigurationError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {toy.vocab_size} tokens of data.toy="
            f"{config.data.toy}: leave it out, or use {toy.vocab_size} or more"
        )
    sets: dict[str, EvaluationSet] = {name: ToyEvaluation(toy, name, seed) for name in toy.sets()}
    return RunData(ToySource(toy, seed), sets, None, toy.vocab_size, fingerprint(config.data))
