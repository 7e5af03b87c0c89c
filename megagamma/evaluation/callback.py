"""Benchmarks on the model in training: `validation.harness_tasks`."""

from __future__ import annotations

import logging

from megagamma.config.schema import Config, ValidationConfig
from megagamma.errors import ConfigurationError
from megagamma.training.callbacks.base import Callback, Step


def check_harness(config: Config) -> None:
    """Check, before anything is built, that the tasks exist and that the mirror has their data. Reads no data set.

    Raises:
        EvaluationError: unknown names with the nearest ones, tasks that are not trusted, or sets that are missing and how
            to get them.
    """
    options = config.validation
    if options.harness_tasks:
        from megagamma.evaluation.tasks import check

        check(
            options.harness_tasks,
            options.harness_include_path,
            options.harness_mirror,
            options.trust_tasks,
            "--validation.trust_tasks true",
        )


class BenchmarkScoring(Callback):
    """Scores the model as it is every `validation.harness_interval` steps, and after the last one.

    Whatever goes wrong is a warning: a run of weeks must not end because of a benchmark. Random states, weights and the
    optimizer's state stay as they are.
    """

    def __init__(self, options: ValidationConfig) -> None:
        self.options = options

    def begin(self) -> None:
        """Raises: ConfigurationError: the data are no text, which benchmarks are made of."""
        if self.options.harness_tasks and self.session.data.codec is None:
            raise ConfigurationError(
                f"validation.harness_tasks={self.options.harness_tasks}: this run's data are no text: leave it out"
            )

    def after_step(self, step: Step) -> None:
        """Add harness/<task>/<metric>, on rank 0, when it is due."""
        interval = self.options.harness_interval
        due = step.is_last or (bool(interval) and step.number % interval == 0)
        if self.options.harness_tasks and due:
            step.values |= self.score(step.number)

    def score(self, step: int) -> dict[str, float]:
        """Score the model; every rank calls this.

        Returns:
            `harness/<task>/<metric>` -> value on rank 0; nothing on the others, or where all failed.
        """
        from megagamma.evaluation import compat, live
        from megagamma.evaluation.harness import evaluate
        from megagamma.evaluation.tasks import TaskRequest

        options, reporter, codec = self.options, self.session.reporter, self.session.data.codec

        def score(passes: live.Passes) -> dict[str, float]:
            try:
                with compat.without_progress_bars():
                    scores = evaluate(
                        live.LiveModel(passes, codec),
                        TaskRequest(list(options.harness_tasks), options.harness_include_path or None),  # type: ignore[arg-type]
                        content_hash=f"step {step}",
                        limit=options.harness_limit or None,
                        seed=self.config.run.seed,
                        mirror=options.harness_mirror or None,
                        say=logging.getLogger(__name__).info,
                    )
            except Exception as error:  # noqa: BLE001
                reporter.warn(f"scoring at step {step} failed, and the run continues: {type(error).__name__}: {error}")
                return {}
            for task, reason in scores.failures.items():
                reporter.warn(f"scoring {task} at step {step} failed, and the run continues: {reason}")
            if scores.records:
                reporter.print(f"  scores at step {step}:\n{scores.table()}")
            return {f"harness/{name}": value for name, value in scores.flat().items()}

        return live.lead(self.engine, score) or {}
