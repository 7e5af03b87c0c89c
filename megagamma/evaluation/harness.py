"""Scores of a model by lm-eval: a Hugging Face folder, or a live `lm_eval.api.model.LM`.

    request = TaskRequest(["reasoning", "arc_easy:5"])
    scores = evaluate("runs/small/hf/step_00001000", request, content_hash="...", output="runs/small/eval/step_00001000")
    print(scores.table())

Tasks are scored one by one and saved after each, so that neither a task that fails nor a kill loses the others, and the
same call again continues with what is missing. Big models: `parallelize=True` splits the layers over this machine's GPUs,
and under `accelerate launch` every GPU scores a share of the documents; both are lm-eval's own means.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from megagamma.environment import accelerate_rank
from megagamma.errors import EvaluationError
from megagamma.evaluation import mirror as mirrors
from megagamma.evaluation.groups import group_records
from megagamma.evaluation.hf_model import HuggingFaceOptions, load_model
from megagamma.evaluation.scores import ScoreFile, Scores, reason
from megagamma.evaluation.scoring import header, score_task
from megagamma.evaluation.tasks import Plan, PlannedTask, TaskRequest, plan


def checked_limit(limit: float | None) -> float | None:
    """A limit as lm-eval wants it.

    Raises:
        EvaluationError: it is neither a whole number of documents nor a share of them.
    """
    if limit is None:
        return None
    if not (0 < limit < math.inf and (limit < 1 or limit == int(limit))):
        raise EvaluationError(f"limit={limit} must be a whole number of documents, or a share below 1")
    return limit if limit < 1 else int(limit)


def evaluate(
    model: Any,
    request: TaskRequest | Plan,
    *,
    content_hash: str,
    output: str | Path | None = None,
    limit: float | None = None,
    seed: int = 1234,
    batch_size: int | str = 8,
    mirror: str | Path | None = None,
    options: HuggingFaceOptions | None = None,
    continuous_metrics: bool = True,
    again: bool = False,
    say: Callable[[str], None] | None = None,
) -> Scores:
    """Score a model on every task of a request.

    Args:
        model: a Hugging Face folder, or an `lm_eval.api.model.LM`. A folder is loaded only when a score is missing.
        request: what to score; a `Plan` of it saves the seconds of planning where several models are scored alike.
        content_hash: of the weights, such as a checksum; scores with another one are not used again.
        output: folder of `scores.json` and `scores.csv`; None keeps nothing.
        limit: score only so many documents of each task, or below 1 that share of them.
        seed: of the choice of examples, and of sampling where a task samples.
        batch_size: requests in one pass; auto lets lm-eval find it on a GPU.
        mirror: folder that stands for the hub's data sets; None: that of MEGAGAMMA_MIRROR, or the hub.
        options: how a folder is run.
        continuous_metrics: also compute what `megagamma.evaluation.continuous` describes.
        again: score even what was scored before.
        say: where progress goes; default: the console, from the first process.

    Returns:
        Scores; tasks that failed are in `failures`. Under `accelerate launch` only the first process gets them.

    Raises:
        EvaluationError: before anything is scored: unknown names, data that a mirror lacks, a model that cannot be loaded.
    """
    is_first = accelerate_rank() == 0
    say = say or (lambda text: print(text, flush=True) if is_first else None)
    limit = checked_limit(limit)
    live = not isinstance(model, (str, Path))
    options = options or HuggingFaceOptions()
    settings = {"kind": type(model).__name__} if live else options.settings
    root = mirrors.find_mirror(mirror)
    ready = request if isinstance(request, Plan) else plan(request)
    store = ScoreFile(Path(output), say) if output is not None else None
    common = {
        "identity": content_hash,
        "limit": limit,
        "seed": seed,
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "datasets")},
    }
    records: dict[str, dict[str, Any]] = {}
    for task in ready.tasks:
        record = store.find(header(task, common)) if store and not again else None
        if record is not None:
            records[task.name] = record
    todo = [task for task in ready.tasks if task.name not in records]
    mirrors.require(root, [(task.name, task.dataset, task.dataset_config) for task in todo], ready.request.expanded)
    if records:
        say(f"scored before: {', '.join(records)}")
    scores = Scores(content_hash)
    if todo:
        lm = model if live else load_model(model, options, batch_size)
        _score_tasks(lm, todo, common, root, continuous_metrics, scores, records, store if lm.rank == 0 else None, say)
        if lm.rank != 0:
            return scores
    scores.records = [records[task.name] for task in ready.tasks if task.name in records]
    scores.records += group_records(ready, records, scores.failures, common)
    return scores


def _score_tasks(
    lm: Any,
    todo: list[PlannedTask],
    common: dict[str, Any],
    root: Path | None,
    continuous_metrics: bool,
    scores: Scores,
    records: dict[str, dict[str, Any]],
    store: ScoreFile | None,
    say: Callable[[str], None],
) -> None:
    """Score tasks one by one; adds to `records` and to the scores' failures."""
    began = time.perf_counter()
    for number, task in enumerate(todo):
        elapsed = time.perf_counter() - began
        eta = f", eta {_duration(elapsed / number * (len(todo) - number))}" if number else ""
        say(f"[{number + 1}/{len(todo)}] {task.name}, {task.fewshot}-shot ({task.fewshot_source}){eta}")
        try:
            with mirrors.reading(root, task.name), _seeded(common["seed"]):
                record = score_task(lm, task, common, continuous_metrics)
        except Exception as error:  # noqa: BLE001 - the scores of the other tasks must not be lost
            scores.failures[task.name] = reason(error)
            say(f"WARNING {task.name} could not be scored: {reason(error)}")
            continue
        if record is not None:
            records[task.name] = record
            scores.new.append(task.name)
            if record["prompts_cut"]:
                cut = f"{record['prompts_cut']} of {record['n']} prompts"
                say(f"  {cut} are longer than the model's context length: lost their start")
            if store is not None:
                store.add(record)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed; afterwards those of before continue as if nothing had been drawn."""
    before = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60:02d}s"
