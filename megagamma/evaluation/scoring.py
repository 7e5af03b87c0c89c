"""One task on one model: lm-eval's metrics, the smooth scores, and what else a reader of them must know."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch

from megagamma.errors import EvaluationError
from megagamma.evaluation import compat, continuous
from megagamma.evaluation.scores import plain
from megagamma.evaluation.tasks import PlannedTask

BOOTSTRAPS = 1000  # resamplings for the errors of metrics that are no mean, such as f1


def header(task: PlannedTask, common: dict[str, Any]) -> dict[str, Any]:
    return {**common, "task": task.name, "task_version": task.version, "fewshot": task.fewshot}


def score_task(lm: Any, planned: PlannedTask, common: dict[str, Any], smooth_scores: bool) -> dict[str, Any] | None:
    """The record of one task; None on all processes but the first."""
    from lm_eval.evaluator import evaluate as run

    begin = time.perf_counter()
    task = _together(lm, lambda: _build(planned, common["seed"]))
    cap = _cap_generation(task, lm)
    # It would warn of every prompt that is cut; they are counted below.
    with compat.suppress_logging(compat.MODEL_LOGGER):
        result = run(
            lm, {"tasks": {planned.name: task}}, limit=common["limit"], bootstrap_iters=BOOTSTRAPS, log_samples=False
        )
    documents = _by_document(task)
    cut = sum(_is_cut(task, requests[0], lm, cap) for requests in documents)
    with compat.suppress_logging(compat.MODEL_LOGGER):
        values, dropped = _smooth_values(task, documents, lm) if smooth_scores else ([], 0)
    hashes = [_hash(repr([request.args for request in requests])) for requests in documents]
    values, hashes, cut, dropped = _over_processes(lm, values, hashes, cut, dropped)
    if result is None:
        return None
    metrics = metrics_of(result["results"][planned.name], task.higher_is_better())
    n = int(result["n-samples"][planned.name]["effective"])
    total = int(result["n-samples"][planned.name]["original"])
    chance = (
        continuous.mean_and_error([one["chance"] for one in values])[0] if values and "chance" in values[0] else None
    )
    for one in metrics:
        if one["metric"] in ("acc", "acc_norm", "acc_bytes"):
            one["chance"] = chance
    metrics += _smooth_metrics(values, chance)
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
    found: dict[Any, list[Any]] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance)
    return [sorted(requests, key=lambda request: request.idx) for requests in found.values()]


def _cap_generation(task: Any, lm: Any) -> int | None:
    """Half of the window, set as the longest answer when the task asks for as much as the window or more; else None.

    lm-eval refuses such a task, and would cut away all of the prompt.
    """
    if task.OUTPUT_TYPE != "generate_until":
        return None
    asked = dict(task.config.generation_kwargs or {})
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    name = next((name for name in names if name in asked), names[0])
    if int(asked.get(name, lm.max_gen_toks)) < lm.max_length:
        return None
    cap = max(1, lm.max_length // 2)
    task.set_config(key="generation_kwargs", value={name: cap}, update=True)
    return cap


def _is_cut(task: Any, request: Any, lm: Any, cap: int | None) -> bool:
    """Whether the model saw only the end of a prompt, which lm-eval only warns about."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or not hasattr(lm, "tok_encode"):
        return False
    if task.OUTPUT_TYPE == "generate_until":
        asked = task.config.generation_kwargs or {}
        return len(lm.tok_encode(request.args[0])) > lm.max_length - int(
            cap or asked.get("max_gen_toks", lm.max_gen_toks)
        )
    return len(lm.tok_encode(request.args[0] + request.args[1])) > lm.max_length + 1


def _smooth_values(task: Any, documents: list[list[Any]], lm: Any) -> tuple[list[dict[str, float]], int]:
    """Smooth scores of this process's documents, and the number of answers that were left out."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return continuous.from_choices(task, documents), 0
    if task.OUTPUT_TYPE == "loglikelihood":
        requests = [request for one in documents for request in one]
        return continuous.from_loglikelihoods(requests, [request.resps[0] for request in requests]), 0
    if task.OUTPUT_TYPE != "generate_until":
        return [], 0
    requests, dropped = continuous.answer_requests(task, documents, lm)
    asked = list(requests)
    if lm.world_size > 1:
        # Every process must make as many passes as the others.
        most = max(lm.all_gather(torch.tensor(len(asked), device=lm.device)).tolist())
        asked += (requests or documents[0])[:1] * (most - len(asked))
    answers = lm.loglikelihood(asked)[: len(requests)] if asked else []
    return continuous.from_loglikelihoods(requests, answers), dropped


def _over_processes(
    lm: Any, values: list[dict[str, float]], hashes: list[str], cut: int, dropped: int
) -> tuple[list[dict[str, float]], list[str], int, int]:
    """Put the shares of all processes together on the first."""
    if lm.world_size == 1:
        return values, hashes, cut, dropped
    found = lm.gather_object((values, hashes, cut, dropped), dst=0)
    if lm.rank != 0:
        return [], [], 0, 0
    cut, dropped = sum(one[2] for one in found), sum(one[3] for one in found)
    return [value for one in found for value in one[0]], [text for one in found for text in one[1]], cut, dropped


def _build(planned: PlannedTask, seed: int) -> Any:
    task = planned.build(seed)
    if len(task.eval_docs) == 0:
        raise EvaluationError(f"{planned.name}: the split that is scored is empty: mend the data set")
    return task


def _together(lm: Any, action: Callable[[], Any]) -> Any:
    """Do something in every process; when it fails in one, all give up, so that none waits for it."""
    found, problem = None, None
    try:
        found = action()
    except Exception as error:  # noqa: BLE001 - raised below, when the others know
        problem = error
    failed = problem is not None
    if lm.world_size > 1:
        failed = bool(lm.all_gather(torch.tensor(int(failed), device=lm.device)).sum())
    if failed:
        raise problem or EvaluationError("another process failed: see its message")
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def metrics_of(values: dict[str, Any], higher: dict[str, Any]) -> list[dict[str, Any]]:
    """lm-eval's `metric,filter` entries as a list."""
    found = []
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr"):
            continue
        found.append(
            {
                "metric": name,
                "filter": filter_name,
                "value": _number(value),
                "stderr": _number(values.get(f"{name}_stderr,{filter_name}")),
                "higher_is_better": higher.get(name, continuous.NAMES.get(name)),
                "smooth": name in continuous.NAMES,
            }
        )
    return found


def _number(value: Any) -> float | None:
    """A finite number, or None for what lm-eval writes as N/A."""
    found = plain(value)
    return float(found) if isinstance(found, (int, float)) else None


def _smooth_metrics(values: list[dict[str, float]], chance: float | None) -> list[dict[str, Any]]:
    found = []
    for name, higher in continuous.NAMES.items():
        if values and name in values[0]:
            mean, error = continuous.mean_and_error([value[name] for value in values])
            one = {"metric": name, "filter": "none", "value": mean, "stderr": error, "higher_is_better": higher}
            found.append({**one, "smooth": True, "chance": chance if name.startswith("choice") else None})
    return found
