"""Benchmarks on the model in training: `validation.harness_tasks`."""

from __future__ import annotations

import logging
from typing import Any

from megagamma.config.schema import Config
from megagamma.distributed.engine import Engine


def check_harness(config: Config) -> None:
    """Check, before anything is built, that the tasks exist and that the mirror has their data. Reads no data set.

    Raises:
        EvaluationError: unknown names with the nearest ones, or sets that are missing and how to get them.
    """
    asked = config.validation
    if asked.harness_tasks:
        from megagamma.evaluation.tasks import check

        check(asked.harness_tasks, asked.harness_include_path, asked.harness_mirror)


def score_live(engine: Engine, tokenizer: Any, config: Config, step: int, reporter: Any) -> dict[str, float]:
    """Score the model as it is; every rank calls this.

    Whatever goes wrong is a warning: a run of weeks must not end because of a benchmark. Random states, weights and the
    optimizer's state stay as they are.

    Returns:
        `harness/<task>/<metric>` -> value on rank 0; nothing on the others, or where all failed.
    """
    from megagamma.evaluation import compat, live
    from megagamma.evaluation.harness import evaluate
    from megagamma.evaluation.tasks import TaskRequest

    asked = config.validation

    def score(passes: live.Passes) -> dict[str, float]:
        try:
            with compat.without_progress_bars():
                scores = evaluate(
                    live.LiveModel(passes, tokenizer),
                    TaskRequest(list(asked.harness_tasks), asked.harness_include_path or None),  # type: ignore[arg-type]
                    content_hash=f"step {step}",
                    limit=asked.harness_limit or None,
                    seed=config.run.seed,
                    mirror=asked.harness_mirror or None,
                    say=logging.getLogger(__name__).info,
                )
        except Exception as error:  # noqa: BLE001
            reporter.warn(f"scoring at step {step} failed, and the run goes on: {type(error).__name__}: {error}")
            return {}
        for task, reason in scores.failures.items():
            reporter.warn(f"scoring {task} at step {step} failed, and the run goes on: {reason}")
        if scores.records:
            reporter.say(f"  scores at step {step}:\n{scores.table()}")
        return {f"harness/{name}": value for name, value in scores.flat().items()}

    return live.lead(engine, score) or {}
