"""Held-out loss."""

from __future__ import annotations

from megagamma.config.schema import ValidationConfig
from megagamma.data.contracts import EvaluationSet, rank_microbatches
from megagamma.training.callbacks.base import Callback, Step


class Validation(Callback):
    """Measures every evaluation set of the run's data at `validation.interval`, and at the end."""

    def __init__(self, validation: ValidationConfig) -> None:
        self.validation = validation

    def after_step(self, step: Step) -> None:
        """Measure when it is due."""
        rules = self.validation
        due = bool(rules.interval) and step.number % rules.interval == 0
        if not due and not (step.is_last and rules.at_end):
            return
        for name, evaluation_set in self.session.data.validation.items():
            step.values |= self.measure(name, evaluation_set, rules.windows)
        if step.is_last and rules.full_at_end:
            for name, evaluation_set in self.session.data.validation.items():
                # Over another part of a set the scores have another name: they do not compare.
                step.values |= self.measure(f"{name}_full", evaluation_set, 0)

    def measure(self, name: str, evaluation_set: EvaluationSet, limit: int) -> dict[str, float]:
        """Scores on the first `limit` samples (0: all) of a set, as val/<name>/<score>; also printed."""
        micro, ranks = self.config.data.micro_batch_size, self.session.runtime.data_size
        size = min(limit, evaluation_set.size) if limit else evaluation_set.size
        share = micro * ranks * self.config.parallel.pipeline  # as many microbatches at a time as fill the pipeline
        first_part = _FirstSamples(evaluation_set, size)
        sums = sum(
            self.engine.evaluate(
                evaluation_set,
                rank_microbatches(first_part, first, share, micro, self.session.runtime.data_rank, ranks),
            )
            for first in range(0, size, share)
        )
        scores = evaluation_set.scores(sums)  # type: ignore[arg-type]
        phrase = evaluation_set.describe(scores, sums)  # type: ignore[arg-type]
        self.session.reporter.print(f"  validation at step {self.session.step}: {name}: {phrase}")
        return {f"val/{name}/{key}": value for key, value in scores.items()}


class _FirstSamples:
    """The first samples of a set; numbers past them stand for empty ones, as past the set's own end."""

    def __init__(self, evaluation_set: EvaluationSet, size: int) -> None:
        self.evaluation_set, self.size = evaluation_set, size

    def batch(self, ids):  # type: ignore[no-untyped-def]
        """As the set's."""
        past_the_end = self.evaluation_set.size
        return self.evaluation_set.batch([index if index < self.size else past_the_end for index in ids])
