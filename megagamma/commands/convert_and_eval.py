"""Convert checkpoints to Hugging Face folders, prove them equal, and score them on benchmarks with lm-eval.

    megagamma convert_and_eval runs/mine                                  # newest checkpoint, preset `quick`
    megagamma convert_and_eval runs/mine --convert_only --dtype bf16 --out exported/mine
    megagamma convert_and_eval runs/mine --steps all --tasks arc_easy     # a curve over training
    megagamma convert_and_eval runs/gamma1 runs/gamma0.5 --tasks reasoning knowledge --mirror mirror
    megagamma convert_and_eval exported/mine --tasks gsm8k:8 --limit 200  # a Hugging Face folder, as it is

A PATH is a run's folder, a checkpoint, or a Hugging Face folder. A folder appears only when its logits equal those of
the model that was trained. What is converted or scored already is not done again. Converted models go to RUN/hf/STEP
and scores to RUN/eval/STEP, with one table over all of them. On a machine without a network, `--mirror` (or the
variable MEGAGAMMA_MIRROR) names the folder that `megagamma fetch_benchmarks` filled on one that has it.

Big models: --parallelize shards the layers over this machine's GPUs; to share the documents over GPUs convert first,
then
`accelerate launch --num_processes 8 -m megagamma.commands convert_and_eval FOLDER --eval_only`.

Exit codes: 0; 1 when a task could not be scored (the others are); 2 for what must be fixed before.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megagamma.environment import accelerate_rank, accelerate_world_size
from megagamma.errors import CheckpointError, ConfigurationError
from megagamma.runs.folder import RunFolder, is_checkpoint, kind_of_folder

SHARD_UNITS = {"MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Job:
    """A model to convert, to score, or both."""

    checkpoint: Path | None
    """None for a Hugging Face folder."""
    run: str
    """What it is called in tables: the folder of its run."""
    folder: Path
    """Of the Hugging Face model."""
    scores: Path
    summary: Path
    """Folder of the tables over all models."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="runs, checkpoints or Hugging Face folders")
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
        help="write, and when scoring run, a model file of our own: for a gate without q/k-norm, which no stock class has",
    )  # fmt: skip
    convert.add_argument("--tokenizer", help='SentencePiece file, or "none" (default: the run\'s)')
    convert.add_argument("--max_shard_size", default="5GB", help="of a file of weights (default 5GB)")
    convert.add_argument(
        "--parity", choices=["auto", "full", "layers"], default="auto",
        help="compare whole models, or a sample of layers (default: whole when memory allows)",
    )  # fmt: skip
    convert.add_argument("--parity_tolerance", type=float, help="largest difference of a logit (default 1e-4)")
    convert.add_argument(
        "--overwrite", action="store_true", help="replace another exported model that is in the folder"
    )
    score = parser.add_argument_group("scoring")
    score.add_argument(
        "--tasks", nargs="+", default=["quick"], metavar="TASK",
        help="presets (reasoning, knowledge, quick) and tasks, groups or tags of lm-eval; NAME:5 for five examples in the "
        "prompt (default quick)",
    )  # fmt: skip
    score.add_argument("--include_path", type=Path, help="folder of task YAMLs of your own")
    score.add_argument(
        "--trust_tasks", action="store_true",
        help="let the tasks of --include_path run their functions, templates and scripts (default: refuse, and list them)",
    )  # fmt: skip
    score.add_argument("--limit", type=float, help="documents of each task, or a share below 1 (default: all)")
    score.add_argument("--mirror", type=Path, help="folder of data sets in place of the hub (or MEGAGAMMA_MIRROR)")
    score.add_argument("--batch_size", default="8", help="requests in one pass, or auto on a GPU (default 8)")
    score.add_argument("--seed", type=int, default=1234, help="of the choice of few-shot examples (default 1234)")
    score.add_argument("--parallelize", action="store_true", help="place the layers over this machine's GPUs")
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


def _requested_steps(run: Path, requested: str) -> list[int]:
    saved = RunFolder(run).steps()
    if not saved:
        raise CheckpointError(f"{run}: holds no finished checkpoint: give a run that has saved one")
    if requested in ("last", "all"):
        return saved if requested == "all" else saved[-1:]
    try:
        steps = [int(one) for one in requested.split(",")]
    except ValueError:
        raise ConfigurationError(f"--steps {requested}: must be last, all, or whole numbers such as 100,200") from None
    for step in steps:
        if step not in saved:
            raise CheckpointError(f"{run}: has no checkpoint of step {step}: it has {', '.join(map(str, saved))}")
    return steps


def _job_of_folder(path: Path, run: str, args: argparse.Namespace) -> Job:
    """A Hugging Face folder."""
    from megagamma.huggingface.provenance import folder_hash

    for flag, given in (("--convert_only", args.convert_only), ("--out", args.out)):
        if given:
            raise ConfigurationError(f"{path}: is a Hugging Face folder already: leave out {flag}")
    scores = args.eval_out / f"{path.name}-{folder_hash(path)[:8]}" if args.eval_out else path / "eval"
    return Job(None, run, path, scores, args.eval_out or Path.cwd() / "eval")


def _job_of_checkpoint(checkpoint: Path, run: str, args: argparse.Namespace) -> Job:
    home = RunFolder(_home(checkpoint))
    folder = (args.out or home.exports / checkpoint.name).resolve()
    if args.eval_only:
        _check_converted(folder, checkpoint)
    summary = args.eval_out or home.evaluations
    return Job(checkpoint, run, folder, (summary / run if args.eval_out else summary) / checkpoint.name, summary)


def _home(path: Path) -> Path:
    """The run's folder of a checkpoint or of a Hugging Face folder, or the folder itself."""
    return path.parent.parent if path.parent.name in ("checkpoints", "hf") else path


def _check_converted(folder: Path, checkpoint: Path) -> None:
    """Refuse to score, in a checkpoint's name, what is not its conversion."""
    from megagamma.checkpoint.reader import CheckpointReader
    from megagamma.huggingface.contents import check_unaltered
    from megagamma.huggingface.provenance import exported_provenance, weights_hash

    if not (folder / "config.json").exists():
        raise ConfigurationError(f"{folder}: is not there: convert it first, without --eval_only")
    if exported_provenance(folder).get("weights") != weights_hash(CheckpointReader(checkpoint)):
        raise ConfigurationError(
            f"{folder}: is not the conversion of {checkpoint}: convert it again, without --eval_only"
        )
    check_unaltered(folder)


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """What each PATH stands for.

    Raises:
        ConfigurationError, CheckpointError: a path that is nothing of the kind.
    """
    found: list[tuple[Path, bool]] = []  # and whether it is a checkpoint
    for given in args.paths:
        path = given.resolve()
        if not path.is_dir():
            raise ConfigurationError(
                f"{path}: there is no such folder: give a run, a checkpoint or a Hugging Face folder"
            )
        if is_checkpoint(path):
            if args.steps != "last":
                raise ConfigurationError(f"--steps {args.steps}: {path} is one checkpoint: give the run's folder")
            found.append((path, True))
        elif kind_of_folder(path) == "run":
            found += [(RunFolder(path).checkpoint(step), True) for step in _requested_steps(path, args.steps)]
        elif (path / "config.json").exists():
            found.append((path, False))
        else:
            raise ConfigurationError(
                f"{path}: holds no checkpoints/, no checkpoint.json and no config.json: give a run, a finished checkpoint "
                "or a Hugging Face folder"
            )
    if args.out and len(found) > 1:
        raise ConfigurationError(f"--out {args.out}: {len(found)} models cannot go to one folder: leave it out")
    homes = {_home(path) for path, _ in found}
    jobs = []
    for path, to_convert in found:
        home = _home(path)
        # Runs of one name in several places are told apart by the folder that they lie in.
        shared = sum(other.name == home.name for other in homes) > 1
        run = f"{home.parent.name}/{home.name}" if shared else home.name
        jobs.append((_job_of_checkpoint if to_convert else _job_of_folder)(path, run, args))
    return jobs


def convert(job: Job, args: argparse.Namespace, device: str) -> None:
    """Convert one checkpoint."""
    import torch

    from megagamma.huggingface.export import ExportOptions, export
    from megagamma.huggingface.parity import TOLERANCE

    assert job.checkpoint is not None
    options = ExportOptions(
        dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32,
        hf_class=args.hf_class,
        custom_code=args.custom_code,
        tokenizer=args.tokenizer,
        max_shard_bytes=shard_bytes(args.max_shard_size),
        parity=args.parity,
        tolerance=TOLERANCE if args.parity_tolerance is None else args.parity_tolerance,
        device=device,
        overwrite=args.overwrite,
    )
    print(f"converting {job.checkpoint}", flush=True)
    print(f"  -> {export(job.checkpoint, job.folder, options)}", flush=True)


def options_of(args: argparse.Namespace, eos: int | None = None) -> Any:
    """How a folder is run by lm-eval."""
    from megagamma.evaluation.hf_model import HuggingFaceOptions, checked_device

    options = HuggingFaceOptions(
        device=args.device,
        parallelize=args.parallelize,
        # In our training the end of a text, and no beginning, stands before the next one.
        prefix_token_id=eos,
        trust_remote_code=args.custom_code,
    )
    # On a CPU bf16 is slow, and no nearer to the truth.
    return replace(options, dtype="float32" if checked_device(options) == "cpu" else "auto")


def check_scoring(jobs: list[Job], args: argparse.Namespace) -> None:
    """Everything about scoring that can be wrong, before an hour of conversion.

    Raises:
        MegagammaError: what must be fixed.
    """
    from megagamma.evaluation.harness import checked_limit
    from megagamma.files import read_json, require_writable

    checked_limit(args.limit)
    options_of(args)
    if args.tokenizer == "none":
        raise ConfigurationError("--tokenizer none: a model without a tokenizer cannot be scored: add --convert_only")
    for job in jobs:
        if job.checkpoint is None or args.eval_only:
            if not any(job.folder.glob("*token*")):
                raise ConfigurationError(f"{job.folder}: has no tokenizer, and cannot be scored without one")
            if "auto_map" in read_json(job.folder / "config.json") and not args.custom_code:
                raise ConfigurationError(f"{job.folder}: brings a model file of its own: --custom_code runs it")
        require_writable(job.scores, "--eval_out")


def score(jobs: list[Job], args: argparse.Namespace, plan: Any) -> tuple[int, list[dict[str, Any]]]:
    """Score converted models; prints and writes tables. Returns the exit code, and rows of `score_rows`."""
    from megagamma.evaluation.curves import Scored, score_rows, table, write
    from megagamma.evaluation.harness import evaluate
    from megagamma.huggingface.provenance import exported_provenance, folder_hash

    items, failed = [], 0
    for job in jobs:
        print(f"\nscoring {job.folder}", flush=True)
        origin = exported_provenance(job.folder)
        scores = evaluate(
            str(job.folder),
            plan,
            content_hash=folder_hash(job.folder),
            output=job.scores,
            limit=args.limit,
            seed=args.seed,
            batch_size=args.batch_size if args.batch_size == "auto" else int(args.batch_size),
            mirror=args.mirror,
            options=options_of(args, origin.get("eos_token_id")),
            again=args.rescore,
        )
        print(scores.table(), flush=True)
        failed += len(scores.failures)
        step, tokens, gamma = (origin.get(key) for key in ("step", "tokens", "gamma"))
        items.append(Scored(f"{job.run} {job.folder.name}", job.run, step or 0, tokens, gamma, scores))
    if accelerate_rank() == 0 and len(items) > 1 and any(item.scores.records for item in items):
        print(f"\n{write(items, jobs[0].summary)}")
        runs = {item.run for item in items}
        if 1 < len(runs) < len(items):
            print(f"\nLast checkpoint of each run:\n{table(items, last_only=True)}")
        print(f"\n{jobs[0].summary}: scores.csv, scores.md, scores.png")
    return 1 if failed else 0, score_rows(items) if any(item.scores.records for item in items) else []


def _quiet_transformers() -> None:
    """Errors only: this program logs itself what it does."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, score."""
    return convert_and_score(arguments)[0]


def convert_and_score(arguments: list[str] | None = None) -> tuple[int, list[dict[str, Any]]]:
    """What the command does; returns its exit code, and a row for every model, task and metric."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if not args.paths and not args.list_tasks:
        parser.error("give at least one PATH")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size) > 0):
        raise ConfigurationError(f"--batch_size {args.batch_size}: must be a whole number above 0, or auto")
    if args.parity_tolerance is not None and not args.parity_tolerance > 0:
        raise ConfigurationError(f"--parity_tolerance {args.parity_tolerance}: must be above 0")
    shard_bytes(args.max_shard_size)
    if args.threads < 0:
        raise ConfigurationError(f"--threads {args.threads}: must be 0 or more")
    if args.list_tasks:
        from megagamma.evaluation.tasks import check, describe

        print("\n".join(describe(check(args.tasks, args.include_path, args.mirror, args.trust_tasks))))
        return 0, []
    jobs = find_jobs(args)
    if not args.eval_only and accelerate_world_size() > 1 and any(job.checkpoint for job in jobs):
        raise ConfigurationError(
            "several processes cannot convert one model: convert first with one, then use --eval_only"
        )
    device, plan = _device(args), None
    if not args.convert_only:
        # Names and data first: it would be a pity to convert for an hour, and then to find no task of that name.
        from megagamma.evaluation.tasks import check

        plan = check(args.tasks, args.include_path, args.mirror, args.trust_tasks)
        check_scoring(jobs, args)
    import torch

    _quiet_transformers()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.eval_only:
        for job in jobs:
            if job.checkpoint is not None:
                convert(job, args, device)
    return (0, []) if args.convert_only else score(jobs, args, plan)


def _device(args: argparse.Namespace) -> str:
    """`--device` as torch knows it."""
    from megagamma.evaluation.hf_model import HuggingFaceOptions, checked_device

    return checked_device(HuggingFaceOptions(device=args.device))
