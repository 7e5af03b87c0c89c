"""One task on one model: lm-eval's metrics, the continuous metrics, and what else a reader of them must know."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch

from megagamma.distributed.exchange import gather_json
from megagamma.errors import EvaluationError
from megagamma.evaluation import continuous
from megagamma.evaluation.compat import MODEL_LOGGER, suppress_logging
from megagamma.evaluation.scores import plain
from megagamma.evaluation.tasks import PlannedTask

BOOTSTRAPS = 1000  # resamplings for the errors of metrics that are no mean, such as f1


def header(task: PlannedTask, common: dict[str, Any]) -> dict[str, Any]:
    """What a task's score depends on, see `scores.KEYS`; `common` is what all tasks of one call share."""
    return {**common, "task": task.name, "task_version": task.version, "fewshot": task.fewshot}


def score_task(
    lm: Any, planned: PlannedTask, common: dict[str, Any], continuous_metrics: bool
) -> dict[str, Any] | None:
    """The record of one task; None on all processes but the first."""
    from lm_eval.evaluator import evaluate as run

    begin = time.perf_counter()
    task = _run_on_all_ranks(lm, lambda: _build(planned, common["seed"]))
    cap = _cap_generation(task, lm)
    # It would warn of every prompt that is cut; they are counted below.
    with suppress_logging(MODEL_LOGGER):
        result = run(
            lm, {"tasks": {planned.name: task}}, limit=common["limit"], bootstrap_iters=BOOTSTRAPS, log_samples=False
        )
    documents = _by_document(task)
    cut = sum(_is_cut(task, requests[0], lm, cap) for requests in documents)
    with suppress_logging(MODEL_LOGGER):
        values, dropped = _continuous_values(task, documents, lm) if continuous_metrics else ([], 0)
    hashes = [_hash(repr([request.args for request in requests])) for requests in documents]
    values, hashes, cut, dropped = _over_processes(lm, values, hashes, cut, dropped)
    if result is None:
        return None
    metrics = metrics_of(result["results"][planned.name], task.higher_is_better())
    n = int(result["n-samples"][planned.name]["effective"])
    total = int(result["n-samples"][planned.name]["original"])
    has_chance = bool(values) and "chance" in values[0]
    chance = continuous.mean_and_error([value["chance"] for value in values])[0] if has_chance else None
    for metric in metrics:
        if metric["metric"] in ("acc", "acc_norm", "acc_bytes"):
            metric["chance"] = chance
    metrics += _continuous_metrics(values, chance)
    return plain(  # type: ignore[no-any-return]
        {
            **header(planned, common),
            "kind": "task",
            "fewshot_source": planned.fewshot_source,
            "dataset": planned.dataset,
            "dataset_config": planned.dataset_config,
            "n": n,
            "n_total": total,
            "subsampled": n < total,
            "metrics": metrics,
            "prompts_sha256": _hash("".join(sorted(hashes))),
            "prompts_cut": cut,
            "answers_left_out": dropped,
            "generation_capped": cap,
            # lm-eval draws the examples of a prompt anew in every process.
            "processes": lm.world_size,
            "seconds": time.perf_counter() - begin,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )


def _by_document(task: Any) -> list[list[Any]]:
    """The requests of each document, in order."""
    documents: dict[Any, list[Any]] = {}
    for instance in task.instances:
        documents.setdefault(instance.doc_id, []).append(instance)
    return [sorted(requests, key=lambda request: request.idx) for requests in documents.values()]


def _cap_generation(task: Any, lm: Any) -> int | None:
    """Half of the context length, set as the longest answer when the task allows as much or more; else None.

    lm-eval refuses such a task, and would cut away all of the prompt.
    """
    if task.OUTPUT_TYPE != "generate_until":
        return None
    options = dict(task.config.generation_kwargs or {})
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    name = next((name for name in names if name in options), names[0])
    if int(options.get(name, lm.max_gen_toks)) < lm.max_length:
        return None
    cap = max(1, lm.max_length // 2)
    task.set_config(key="generation_kwargs", value={name: cap}, update=True)
    return cap


def _is_cut(task: Any, request: Any, lm: Any, cap: int | None) -> bool:
    """Whether the model saw only the end of a prompt, which lm-eval only warns about."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or not hasattr(lm, "tok_encode"):
        return False
    if task.OUTPUT_TYPE == "generate_until":
        options = task.config.generation_kwargs or {}
        longest = int(cap or options.get("max_gen_toks", lm.max_gen_toks))
        return len(lm.tok_encode(request.args[0])) > lm.max_length - longest
    return len(lm.tok_encode(request.args[0] + request.args[1])) > lm.max_length + 1


def _continuous_values(task: Any, documents: list[list[Any]], lm: Any) -> tuple[list[dict[str, float]], int]:
    """Continuous metrics of this process's documents, and the number of answers that were left out."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return continuous.from_choices(task, documents), 0
    if task.OUTPUT_TYPE == "loglikelihood":
        requests = [request for document in documents for request in document]
        return continuous.from_loglikelihoods(requests, [request.resps[0] for request in requests]), 0
    if task.OUTPUT_TYPE != "generate_until":
        return [], 0
    requests, dropped = continuous.answer_requests(task, documents, lm)
    padded = list(requests)
    if lm.world_size > 1:
        # Every process must make as many passes as the others.
        most = max(lm.all_gather(torch.tensor(len(padded), device=lm.device)).tolist())
        padded += (requests or documents[0])[:1] * (most - len(padded))
    answers = lm.loglikelihood(padded)[: len(requests)] if padded else []
    return continuous.from_loglikelihoods(requests, answers), dropped


def _over_processes(
    lm: Any, values: list[dict[str, float]], hashes: list[str], cut: int, dropped: int
) -> tuple[list[dict[str, float]], list[str], int, int]:
    """Put the shares of all processes together on the first."""
    if lm.world_size == 1:
        return values, hashes, cut, dropped
    # lm-eval's `gather_object` would exchange pickles.
    shares = gather_json((values, hashes, cut, dropped), lm.world_size, lm.device, lm.all_gather)
    if lm.rank != 0:
        return [], [], 0, 0
    return (
        [value for share in shares for value in share[0]],
        [text for share in shares for text in share[1]],
        sum(share[2] for share in shares),
        sum(share[3] for share in shares),
    )


def _build(planned: PlannedTask, seed: int) -> Any:
    task = planned.build(seed)
    if len(task.eval_docs) == 0:
        raise EvaluationError(f"{planned.name}: the split that is scored is empty: fix the data set")
    return task


def _run_on_all_ranks(lm: Any, action: Callable[[], Any]) -> Any:
    """Do something in every process; when it fails in one, all give up, so that none waits for it."""
    result, problem = None, None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 - raised below, when the others know
        problem = error
    failed = problem is not None
    if lm.world_size > 1:
        failed = bool(lm.all_gather(torch.tensor(int(failed), device=lm.device)).sum())
    if failed:
        raise problem or EvaluationError("another process failed: see its message")
    return result


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def metrics_of(values: dict[str, Any], higher: dict[str, Any]) -> list[dict[str, Any]]:
    """lm-eval's `metric,filter` entries as a list."""
    metrics = []
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr"):
            continue
        metrics.append(
            {
                "metric": name,
                "filter": filter_name,
                "value": _number(value),
                "stderr": _number(values.get(f"{name}_stderr,{filter_name}")),
                "higher_is_better": higher.get(name, continuous.NAMES.get(name)),
                "smooth": name in continuous.NAMES,
            }
        )
    return metrics


def _number(value: Any) -> float | None:
    """A finite number, or None for what lm-eval writes as N/A."""
    number = plain(value)
    return float(number) if isinstance(number, (int, float)) else None


def _continuous_metrics(values: list[dict[str, float]], chance: float | None) -> list[dict[str, Any]]:
    metrics = []
    for name, higher in continuous.NAMES.items():
        if values and name in values[0]:
            mean, error = continuous.mean_and_error([value[name] for value in values])
            metric = {"metric": name, "filter": "none", "value": mean, "stderr": error, "higher_is_better": higher}
            metrics.append({**metric, "smooth": True, "chance": chance if name.startswith("choice") else None})
    return metrics
