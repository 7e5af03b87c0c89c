"""Scores of a model by lm-eval: a Hugging Face folder, or a live `lm_eval.api.model.LM`.

    request = TaskRequest(["reasoning", "arc_easy:5"])
    scores = evaluate("runs/mine/hf/step_00001000", request, identity="sha256:...", output="runs/mine/eval/step_00001000")
    print(scores.table())

Tasks are scored one by one and saved after each, so that neither a task that fails nor a kill loses the others, and the
same call again goes on with what is missing. Big models: `parallelize=True` splits the layers over this machine's GPUs,
and under `accelerate launch` every GPU scores a share of the documents; both are lm-eval's own means.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from megagamma.errors import EvaluationError
from megagamma.interop import mirror, smooth
from megagamma.interop.scores import ScoreFile, Scores, plain
from megagamma.interop.tasks import Plan, PlannedTask, TaskRequest, plan

BOOTSTRAPS = 1000  # resamplings for the errors of metrics that are no mean, such as f1


@dataclass
class HuggingFaceOptions:
    """How a Hugging Face folder is run.

    Attributes:
        device: auto (cuda when there is one), cpu, cuda or cuda:1.
        dtype: auto (as saved), float32, bfloat16 or float16.
        parallelize: split the layers over all GPUs of this machine.
        max_length: window in tokens; None takes the model's.
        prefix_token_id: what stands before a text without a prompt; None: the tokenizer's bos, else its eos. Models that
            were trained with documents parted by eos alone need eos.
        trust_remote_code: run the folder's own model file.
    """

    device: str = "auto"
    dtype: str = "auto"
    parallelize: bool = False
    max_length: int | None = None
    prefix_token_id: int | None = None
    trust_remote_code: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What of it changes scores."""
        return {
            "kind": "hf",
            "dtype": self.dtype,
            "max_length": self.max_length,
            "prefix_token_id": self.prefix_token_id,
        }


def load_model(folder: str | Path, options: HuggingFaceOptions, batch_size: int | str = 8) -> Any:
    """lm-eval's `hf` model over a folder.

    Raises:
        EvaluationError: no such folder, no such device, or what transformers says about it.
    """
    folder = Path(folder).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise EvaluationError(f"model={folder}: not a Hugging Face model folder: config.json is missing")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EvaluationError(f"device={options.device}, but torch sees no GPU here: use cpu or auto")
    if options.parallelize and device == "cpu":
        raise EvaluationError("parallelize needs GPUs, and torch sees none here: leave it out")
    if device == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EvaluationError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} on a CPU: lm-eval shares documents over GPUs only: start one process"
        )
    from lm_eval.models.huggingface import HFLM

    try:
        return HFLM(
            pretrained=str(folder),
            device=device,
            dtype=options.dtype,
            batch_size=batch_size,
            parallelize=options.parallelize,
            max_length=options.max_length,
            prefix_token_id=options.prefix_token_id,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:
        raise EvaluationError(
            f"model={folder}: cannot be loaded ({_reason(error)}): convert it again, or see whether it fits in memory"
        ) from error


def evaluate(
    model: Any,
    request: TaskRequest,
    *,
    identity: str,
    output: str | Path | None = None,
    limit: float | None = None,
    seed: int = 1234,
    batch_size: int | str = 8,
    root: str | Path | None = None,
    options: HuggingFaceOptions | None = None,
    smooth_scores: bool = True,
    again: bool = False,
    say: Callable[[str], None] | None = None,
) -> Scores:
    """Score a model on every task of a request.

    Args:
        model: a Hugging Face folder, or an `lm_eval.api.model.LM`. A folder is loaded only when a score is missing.
        request: what to score.
        identity: of the weights, such as a checksum; scores of another identity are not used again.
        output: folder of `scores.json` and `scores.csv`; None keeps nothing.
        limit: score only so many documents of each task, or below 1 that share of them.
        seed: of the choice of examples, and of sampling where a task samples.
        batch_size: requests in one pass; auto lets lm-eval find it on a GPU.
        root: mirror of the hub's data sets; None: what MEGAGAMMA_MIRROR says, or the hub.
        options: how a folder is run.
        smooth_scores: also compute what `megagamma.interop.smooth` describes.
        again: score even what was scored before.
        say: where progress goes; default: the console, from the first process.

    Returns:
        Scores; tasks that failed are in `failures`. Under `accelerate launch` only the first process gets them.

    Raises:
        EvaluationError: before anything is scored: unknown names, data that a mirror lacks, a model that cannot be loaded.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    say = say or (lambda text: print(text, flush=True) if first else None)
    if limit is not None and not (0 < limit < math.inf and (limit < 1 or limit == int(limit))):
        raise EvaluationError(f"limit={limit} must be a whole number of documents, or a share below 1")
    live = not isinstance(model, (str, Path))
    options = options or HuggingFaceOptions()
    settings = {"kind": type(model).__name__} if live else options.settings
    root = mirror.find_mirror(root)
    made = plan(request)
    store = ScoreFile(Path(output), say) if output is not None else None
    common = {
        "identity": identity,
        "limit": limit,
        "seed": seed,
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "datasets")},
    }
    known: dict[str, dict[str, Any]] = {}
    for task in made.tasks:
        found = store.find(_header(task, common)) if store and not again else None
        if found is not None:
            known[task.name] = found
    todo = [task for task in made.tasks if task.name not in known]
    mirror.require(root, [(task.name, task.dataset, task.dataset_config) for task in todo])
    if known:
        say(f"scored before: {', '.join(known)}")
    scores = Scores(identity)
    if todo:
        lm = model if live else load_model(model, options, batch_size)
        first = lm.rank == 0
        _score_tasks(lm, todo, common, root, smooth_scores, scores, known, store if first else None, say)
    scores.records = [known[task.name] for task in made.tasks if task.name in known]
    scores.records += _group_records(made, known, scores.failures, common)
    return scores


def _header(task: PlannedTask, common: dict[str, Any]) -> dict[str, Any]:
    return {**common, "task": task.name, "task_version": task.version, "fewshot": task.fewshot}


def _score_tasks(
    lm: Any,
    todo: list[PlannedTask],
    common: dict[str, Any],
    root: Path | None,
    smooth_scores: bool,
    scores: Scores,
    known: dict[str, dict[str, Any]],
    store: ScoreFile | None,
    say: Callable[[str], None],
) -> None:
    """Score tasks one by one; adds to `known` and to the scores' failures."""
    began = time.perf_counter()
    for number, task in enumerate(todo):
        elapsed = time.perf_counter() - began
        eta = f", eta {_duration(elapsed / number * (len(todo) - number))}" if number else ""
        say(f"[{number + 1}/{len(todo)}] {task.name}, {task.fewshot}-shot ({task.fewshot_source}){eta}")
        try:
            with mirror.reading(root, task.name), _seeded(common["seed"]):
                record = _score(lm, task, common, smooth_scores)
        except Exception as error:  # noqa: BLE001 - the scores of the other tasks must not be lost
            scores.failures[task.name] = _reason(error)
            say(f"WARNING {task.name} could not be scored: {_reason(error)}")
            continue
        if record is not None:
            known[task.name] = record
            scores.fresh.append(task.name)
            if store is not None:
                store.add(record)


def _score(lm: Any, planned: PlannedTask, common: dict[str, Any], smooth_scores: bool) -> dict[str, Any] | None:
    """The record of one task; None on all processes but the first."""
    from lm_eval.evaluator import evaluate as run

    begin = time.perf_counter()
    task = planned.build(common["seed"])
    if len(task.eval_docs) == 0:
        raise EvaluationError(f"{planned.name}: the split that is scored is empty: mend the data set")
    cap = _cap_generation(task, lm)
    result = run(
        lm, {"tasks": {planned.name: task}}, limit=common["limit"], bootstrap_iters=BOOTSTRAPS, log_samples=False
    )
    documents = _by_document(task)
    cut = sum(_is_cut(task, requests[0], lm, cap) for requests in documents)
    values, dropped = _smooth_values(task, documents, lm) if smooth_scores else ([], 0)
    values, cut, dropped = _over_processes(lm, values, cut, dropped)
    if result is None:
        return None
    metrics = _metrics(result["results"][planned.name], task.higher_is_better())
    n = int(result["n-samples"][planned.name]["effective"])
    total = int(result["n-samples"][planned.name]["original"])
    chance = smooth.mean_and_error([one["chance"] for one in values])[0] if values and "chance" in values[0] else None
    for one in metrics:
        if one["metric"] in ("acc", "acc_norm", "acc_bytes"):
            one["chance"] = chance
    metrics += _smooth_metrics(values, chance)
    return plain(  # type: ignore[no-any-return]
        {
            **_header(planned, common),
            "kind": "task",
            "fewshot_source": planned.fewshot_source,
            "dataset": planned.dataset,
            "dataset_config": planned.dataset_config,
            "n": n,
            "n_total": total,
            "subsampled": n < total,
            "metrics": metrics,
            "prompts_cut": cut,
            "answers_left_out": dropped,
            "generation_capped": cap,
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
        return smooth.from_choices(task, documents), 0
    if task.OUTPUT_TYPE == "loglikelihood":
        requests = [request for one in documents for request in one]
        return smooth.from_loglikelihoods(requests, [request.resps[0] for request in requests]), 0
    if task.OUTPUT_TYPE != "generate_until":
        return [], 0
    requests, dropped = smooth.answer_requests(task, documents, lm)
    asked = list(requests)
    if lm.world_size > 1:
        # Every process must make as many passes as the others.
        most = max(lm.all_gather(torch.tensor(len(asked), device=lm.device)).tolist())
        asked += (requests or documents[0])[:1] * (most - len(asked))
    answers = lm.loglikelihood(asked)[: len(requests)] if asked else []
    return smooth.from_loglikelihoods(requests, answers), dropped


def _over_processes(
    lm: Any, values: list[dict[str, float]], cut: int, dropped: int
) -> tuple[list[dict[str, float]], int, int]:
    """Put the shares of all processes together on the first."""
    if lm.world_size == 1:
        return values, cut, dropped
    found = lm.gather_object((values, cut, dropped), dst=0)
    if lm.rank != 0:
        return [], 0, 0
    return [value for one in found for value in one[0]], sum(one[1] for one in found), sum(one[2] for one in found)


def _metrics(values: dict[str, Any], higher: dict[str, Any]) -> list[dict[str, Any]]:
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
                "higher_is_better": higher.get(name, smooth.NAMES.get(name)),
                "smooth": name in smooth.NAMES,
            }
        )
    return found


def _number(value: Any) -> float | None:
    """A finite number, or None for what lm-eval writes as N/A."""
    found = plain(value)
    return float(found) if isinstance(found, (int, float)) else None


def _smooth_metrics(values: list[dict[str, float]], chance: float | None) -> list[dict[str, Any]]:
    found = []
    for name, higher in smooth.NAMES.items():
        if values and name in values[0]:
            mean, error = smooth.mean_and_error([value[name] for value in values])
            one = {"metric": name, "filter": "none", "value": mean, "stderr": error, "higher_is_better": higher}
            found.append({**one, "smooth": True, "chance": chance if name.startswith("choice") else None})
    return found


def _group_records(
    made: Plan, known: dict[str, dict[str, Any]], failures: dict[str, str], common: dict[str, Any]
) -> list[dict[str, Any]]:
    """Averages over groups, by lm-eval's own rules; smooth scores weighted by the number of documents."""
    from dataclasses import replace

    from lm_eval.config.group import AggMetricConfig

    found = []
    for group in made.groups:
        names = [task.task_name for task in group.get_all_tasks()]
        lost = [name for name in names if name not in known]
        if not group.has_aggregation or not names:
            continue
        if lost:
            failures[group.name] = f"{len(lost)} of its {len(names)} tasks have no score"
            continue
        records = [known[name] for name in names]
        ours = [AggMetricConfig(metric=name, aggregation="mean", weight_by_size=True) for name in smooth.NAMES]
        with_ours = replace(group, aggregate_metric_list=[*group.aggregate_metric_list, *ours])
        with _silent("lm_eval.api.group"):
            values = with_ours.aggregate({record["task"]: _as_lm_eval(record) for record in records})
        higher = {one["metric"]: one["higher_is_better"] for record in records for one in record["metrics"]}
        metrics = _metrics(values, higher)
        sizes = sum(record["n"] for record in records)
        for one in metrics:
            chances = [(_chance(record, one["metric"]), record["n"]) for record in records]
            if all(chance is not None for chance, _ in chances):
                one["chance"] = sum(chance * n for chance, n in chances if chance is not None) / sizes
        shots = {record["fewshot"] for record in records}
        found.append(
            {
                **common,
                "task": group.name,
                "task_version": group.version,
                "kind": "group",
                "fewshot": shots.pop() if len(shots) == 1 else None,
                "members": names,
                "n": sizes,
                "n_total": sum(record["n_total"] for record in records),
                "subsampled": any(record["subsampled"] for record in records),
                "metrics": metrics,
            }
        )
    return found


def _chance(record: dict[str, Any], name: str) -> float | None:
    found: float | None = next((one.get("chance") for one in record["metrics"] if one["metric"] == name), None)
    return found


def _as_lm_eval(record: dict[str, Any]) -> dict[str, Any]:
    """A record in the form that lm-eval's groups read."""
    found: dict[str, Any] = {"sample_len": record["n"]}
    for one in record["metrics"]:
        if one["value"] is not None:
            found[f"{one['metric']},{one['filter']}"] = one["value"]
            found[f"{one['metric']}_stderr,{one['filter']}"] = "N/A" if one["stderr"] is None else one["stderr"]
    return found


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Without a logger's warnings."""
    import logging

    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed; afterwards those of before go on as if nothing had been drawn."""
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


def _reason(error: BaseException, length: int = 300) -> str:
    text = " ".join(str(error).split())
    text = text if isinstance(error, EvaluationError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= length else text[:length] + "..."


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60:02d}s"
