"""Convert checkpoints to Hugging Face folders, prove them equal, and score them on benchmarks with lm-eval.

    python tools/convert_and_eval.py runs/mine                                  # newest checkpoint, preset `quick`
    python tools/convert_and_eval.py runs/mine --convert_only --dtype bf16 --out exported/mine
    python tools/convert_and_eval.py runs/mine --steps all --tasks arc_easy     # a curve over training
    python tools/convert_and_eval.py runs/gamma1 runs/gamma0.5 --tasks reasoning knowledge --mirror mirror
    python tools/convert_and_eval.py exported/mine --tasks gsm8k:8 --limit 200  # a Hugging Face folder, as it is

A PATH is a run's folder, a checkpoint, or a Hugging Face folder. A folder appears only when its logits equal those of
the model that was trained. What is converted or scored already is not done again. Converted models go to RUN/hf/STEP
and scores to RUN/eval/STEP, with one table over all of them. On a machine without a network, `--mirror` (or the
variable MEGAGAMMA_MIRROR) names the folder that `tools/fetch_benchmarks.py` filled on one that has it.

Big models: --parallelize spreads the layers over this machine's GPUs; to share the documents over GPUs convert first,
then `accelerate launch --num_processes 8 tools/convert_and_eval.py FOLDER --eval_only`.

Exit codes: 0; 1 when a task could not be scored (the others are); 2 for what must be mended before.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagamma.cli import main_guard
from megagamma.errors import CheckpointError, ConfigurationError
from megagamma.training.reading import folder_name, steps_saved

SHARD_UNITS = {"MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Job:
    """A model to convert, to score, or both."""

    checkpoint: Path | None
    """None for a Hugging Face folder."""
    folder: Path
    """Of the Hugging Face model."""
    scores: Path


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="runs, checkpoints or Hugging Face folders")
    parser.add_argument("--steps", default="last", help="checkpoints of a run: last (default), all, or 100,200,300")
    parser.add_argument("--out", type=Path, help="folder of the converted model (default RUN/hf/STEP); for one model")
    parser.add_argument("--eval_out", type=Path, help="folder of the scores and tables (default RUN/eval)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--convert_only", action="store_true", help="do not score")
    only.add_argument("--eval_only", action="store_true", help="score what is converted already; never convert")
    convert = parser.add_argument_group("conversion")
    convert.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default fp32)")
    convert.add_argument(
        "--hf_class", choices=["llama", "qwen3", "qwen3_5", "qwen3_next", "lfm3", "gated_llama"],
        help="class to export to (default: the first that can hold the model). A gate: qwen3_5, or qwen3_next for "
        "transformers 4.57; a gate per head is repeated over the head's features there, lfm3 keeps it",
    )  # fmt: skip
    convert.add_argument(
        "--custom_code", action="store_true",
        help="write a model file of our own for a gate without q/k-norm, which no stock class has",
    )  # fmt: skip
    convert.add_argument("--tokenizer", help='SentencePiece file, or "none" (default: the run\'s)')
    convert.add_argument("--max_shard_size", default="5GB", help="of a file of weights (default 5GB)")
    convert.add_argument(
        "--parity", choices=["auto", "full", "layers"], default="auto",
        help="compare whole models, or a sample of layers (default: whole when memory allows)",
    )  # fmt: skip
    convert.add_argument("--parity_tolerance", type=float, help="largest difference of a logit (default 1e-4)")
    convert.add_argument("--overwrite", action="store_true", help="replace a folder that holds another model")
    score = parser.add_argument_group("scoring")
    score.add_argument(
        "--tasks", nargs="+", default=["quick"], metavar="TASK",
        help="presets (reasoning, knowledge, quick) and tasks, groups or tags of lm-eval; NAME:5 for five examples in the "
        "prompt (default quick)",
    )  # fmt: skip
    score.add_argument("--include_path", type=Path, help="folder of task YAMLs of your own")
    score.add_argument("--limit", type=float, help="documents of each task, or a share below 1 (default: all)")
    score.add_argument("--mirror", type=Path, help="folder of data sets in place of the hub (or MEGAGAMMA_MIRROR)")
    score.add_argument("--batch_size", default="8", help="requests in one pass, or auto on a GPU (default 8)")
    score.add_argument("--seed", type=int, default=1234, help="of the choice of few-shot examples (default 1234)")
    score.add_argument("--parallelize", action="store_true", help="spread the layers over this machine's GPUs")
    score.add_argument("--rescore", action="store_true", help="score even what was scored before")
    score.add_argument("--list_tasks", action="store_true", help="print the tasks and few-shot counts, and stop")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    return parser


def shard_bytes(text: str) -> int:
    """ "5GB" in bytes.

    Raises:
        ConfigurationError: not a positive number of MB or GB.
    """
    unit = SHARD_UNITS.get(text[-2:].upper())
    try:
        size = float(text[:-2]) * (unit or 0)
    except ValueError:
        size = 0
    if not 0 < size < 2**62:
        raise ConfigurationError(f"--max_shard_size {text}: must be a number of MB or GB, such as 5GB")
    return int(size)


def _wanted_steps(run: Path, wanted: str) -> list[int]:
    saved = steps_saved(run / "checkpoints")
    if not saved:
        raise CheckpointError(f"{run}: holds no finished checkpoint: give a run that has saved one")
    if wanted in ("last", "all"):
        return saved if wanted == "all" else saved[-1:]
    try:
        steps = [int(one) for one in wanted.split(",")]
    except ValueError:
        raise ConfigurationError(f"--steps {wanted}: must be last, all, or whole numbers such as 100,200") from None
    for step in steps:
        if step not in saved:
            raise CheckpointError(f"{run}: has no checkpoint of step {step}: it has {', '.join(map(str, saved))}")
    return steps


def find_jobs(known: argparse.Namespace) -> list[Job]:
    """What each PATH stands for.

    Raises:
        ConfigurationError, CheckpointError: a path that is nothing of the kind.
    """
    jobs: list[Job] = []
    for path in known.paths:
        path = path.resolve()
        if not path.is_dir():
            raise ConfigurationError(
                f"{path}: there is no such folder: give a run, a checkpoint or a Hugging Face folder"
            )
        if (path / "checkpoint.json").exists():
            checkpoints = [path]
        elif (path / "checkpoints").is_dir():
            checkpoints = [path / "checkpoints" / folder_name(step) for step in _wanted_steps(path, known.steps)]
        elif (path / "config.json").exists():
            if known.convert_only:
                raise ConfigurationError(f"{path}: is a Hugging Face folder already: leave out --convert_only")
            jobs.append(Job(None, path, known.eval_out or path / "eval"))
            continue
        else:
            raise ConfigurationError(
                f"{path}: holds no checkpoints/, no checkpoint.json and no config.json: give a run, a finished checkpoint "
                "or a Hugging Face folder"
            )
        for checkpoint in checkpoints:
            run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
            folder = (known.out or run / "hf" / checkpoint.name).resolve()
            if known.eval_only and not (folder / "config.json").exists():
                raise ConfigurationError(f"{folder}: is not there: convert it first, without --eval_only")
            scores = (known.eval_out / run.name if known.eval_out else run / "eval") / checkpoint.name
            jobs.append(Job(checkpoint, folder, scores))
    if known.out and len(jobs) > 1:
        raise ConfigurationError(f"--out {known.out}: {len(jobs)} models cannot go to one folder: leave it out")
    return jobs


def convert(job: Job, known: argparse.Namespace, device: str) -> None:
    """Convert one checkpoint."""
    import torch

    from megagamma.interop.export import ExportOptions, export
    from megagamma.interop.parity import TOLERANCE

    assert job.checkpoint is not None
    options = ExportOptions(
        dtype=torch.bfloat16 if known.dtype == "bf16" else torch.float32,
        hf_class=known.hf_class,
        custom_code=known.custom_code,
        tokenizer=known.tokenizer,
        max_shard_bytes=shard_bytes(known.max_shard_size),
        parity=known.parity,
        tolerance=TOLERANCE if known.parity_tolerance is None else known.parity_tolerance,
        device=device,
        overwrite=known.overwrite,
    )
    print(f"converting {job.checkpoint}", flush=True)
    print(f"  -> {export(job.checkpoint, job.folder, options)}", flush=True)


def score(jobs: list[Job], known: argparse.Namespace, origins: list[dict[str, Any]]) -> int:
    """Score converted models; prints and writes tables. Returns the exit code."""
    from megagamma.interop.curves import Scored, write
    from megagamma.interop.harness import evaluate
    from megagamma.interop.hf_model import HuggingFaceOptions
    from megagamma.interop.tasks import TaskRequest

    request = TaskRequest(known.tasks, known.include_path)
    items, failed = [], 0
    for job, origin in zip(jobs, origins, strict=True):
        print(f"\nscoring {job.folder}", flush=True)
        scores = evaluate(
            str(job.folder),
            request,
            identity=origin.get("identity", job.folder.name),
            output=job.scores,
            limit=known.limit,
            seed=known.seed,
            batch_size=known.batch_size if known.batch_size == "auto" else int(known.batch_size),
            mirror=known.mirror,
            options=HuggingFaceOptions(
                device=known.device,
                parallelize=known.parallelize,
                # In our training the end of a text, and no beginning, stands before the next one.
                prefix_token_id=origin.get("eos_token_id"),
                trust_remote_code=known.custom_code,
            ),
            again=known.rescore,
        )
        print(scores.table(), flush=True)
        failed += len(scores.failures)
        run = origin.get("name", job.folder.name)
        items.append(
            Scored(f"{run} {job.folder.name}", run, origin.get("step", 0), origin.get("tokens"), origin.get("gamma"), scores)
        )  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0 and len(items) > 1 and any(item.scores.records for item in items):
        folder = known.eval_out or jobs[0].scores.parent
        print(f"\n{write(items, folder)}\n\n{folder}: scores.csv, scores.md, scores.png")
    return 1 if failed else 0


def _quiet_transformers() -> None:
    """Errors only: this program tells itself what it does."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, score."""
    known = build_parser().parse_args(arguments)
    if known.batch_size != "auto" and not (known.batch_size.isdigit() and int(known.batch_size) > 0):
        raise ConfigurationError(f"--batch_size {known.batch_size}: must be a whole number above 0, or auto")
    if known.parity_tolerance is not None and not known.parity_tolerance > 0:
        raise ConfigurationError(f"--parity_tolerance {known.parity_tolerance}: must be above 0")
    shard_bytes(known.max_shard_size)
    jobs = find_jobs(known)
    if not known.convert_only:
        # Names and data first: it would be a pity to convert for an hour, and then to find no task of that name.
        from megagamma.interop.tasks import check, describe

        plan = check(known.tasks, known.include_path, known.mirror)
        if known.list_tasks:
            print("\n".join(describe(plan)))
            return 0
    import torch

    _quiet_transformers()
    if known.threads:
        torch.set_num_threads(known.threads)
    device = known.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"--device {known.device}, but torch sees no GPU here: use cpu or auto")
    if not known.eval_only:
        for job in jobs:
            if job.checkpoint is not None:
                convert(job, known, device)
    if known.convert_only:
        return 0
    from megagamma.interop.export import exported_origin

    return score(jobs, known, [exported_origin(job.folder) for job in jobs])


if __name__ == "__main__":
    sys.exit(main_guard(main))
