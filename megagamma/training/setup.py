"""Everything between a validated config and the first step: data, model, weights, engine, resume."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megagamma.checkpoint import retention, saver
from megagamma.checkpoint.manifest import stored_config
from megagamma.config.io import as_dict, differences
from megagamma.config.schema import Config, padded_vocab_size
from megagamma.data.contracts import rank_microbatches
from megagamma.data.schedule import batch_size, total_steps
from megagamma.data.sources import RunData
from megagamma.distributed.engine import Engine
from megagamma.distributed.runtime import Runtime
from megagamma.distributed.state import partition_writer
from megagamma.errors import CheckpointError
from megagamma.initialization.report import (
    as_json,
    by_role,
    check,
    norm_saturation,
    saturation_lines,
    table,
)
from megagamma.model.initialize import draw, fill, report_drawn
from megagamma.model.parameters import ParameterMap
from megagamma.planning.memory import check_fits
from megagamma.reporting.log import Reporter
from megagamma.runs.folder import RunFolder, check_folder, checkpoint_folders
from megagamma.runs.lock import RunLock
from megagamma.runs.provenance import installed_versions, provenance
from megagamma.training.assembly import build
from megagamma.training.choices import Choices, choose
from megagamma.training.optimizer import describe_groups, parameter_groups


@dataclass
class Session:
    """A run that is ready for its next step. As a context it lets go of the folder and the process groups at its end."""

    config: Config
    runtime: Runtime
    data: RunData
    engine: Engine
    reporter: Reporter
    folder: RunFolder
    lock: RunLock
    """Held by rank 0 alone."""
    steps: int
    step: int = 0
    """Steps done."""
    consumed: int = 0
    """Samples consumed."""
    seconds: float = 0.0
    """Spent in steps, over all processes that trained the run."""
    progress: dict[str, Any] = field(default_factory=dict)
    """What callbacks kept in the checkpoint, by their keys."""

    def describe(self) -> str:
        """What is trained where, as one line."""
        config, runtime = self.config, self.runtime
        return (
            f"training {self.folder.path} from step {self.step} to {self.steps}: {config.data.global_batch_size} samples of "
            f"{config.data.sequence_length} tokens a step, on {runtime.size} x {runtime.device.type} "
            f"(tensor {runtime.tensor_size}, pipeline {config.parallel.pipeline}, data {runtime.data_size}, "
            f"ZeRO {self.engine.zero_stage})"
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reporter.close()
        self.lock.release()
        if kind is None:
            self.engine.close()
        else:
            # Other ranks may be gone, and leaving the groups would wait for them. What fails here must not hide the error.
            with contextlib.suppress(Exception):
                self.engine.release()


# What a checkpoint belongs to: another value here is another model, or another experiment under the same name.
_FIXED_SECTIONS = ("model", "init")


def _check_same_run(
    folder: Path, config: Config, source: Path, manifest: dict[str, Any], fingerprint: str, where: str = ""
) -> list[str]:
    """Refuse a resume with another model; returns other options that changed.

    Args:
        where: the option that names the checkpoint; empty: run.folder.

    Raises:
        CheckpointError: naming the options, with both values.
    """
    where = where or f"run.folder={folder}"
    if manifest["tokenizer"] not in (fingerprint, ""):  # a model imported without one takes any
        raise CheckpointError(
            f"{where}: its checkpoint was trained with tokenizer {manifest['tokenizer'][:12]}, the data has "
            f"{fingerprint[:12]}: give the same data, or another run.folder"
        )
    saved = stored_config(source, manifest)
    changed = differences(saved, config, _FIXED_SECTIONS)
    if changed or saved.run.seed != config.run.seed:
        changed = changed or [f"run.seed: {saved.run.seed} -> {config.run.seed}"]
        raise CheckpointError(
            f"{where} holds a checkpoint of another model ({'; '.join(changed)}): give the same values, or "
            + ("another checkpoint" if where.startswith("run.branch_from") else "another run.folder")
        )
    return differences(saved, config, ("data", "optimizer", "schedule"))


def _initialize(config: Config, runtime: Runtime, parameter_map: ParameterMap, folder: RunFolder) -> None:
    """Fill the weights and report what was drawn; refuses weights that do not have their target std."""
    drawn = fill(parameter_map, config, partition_writer(runtime))
    matrices = report_drawn(drawn, config, runtime.gather_over_model)
    roles = by_role(matrices, config.init)
    model = config.model
    stds = {row.role: row.asked_std for row in roles}
    saturation = norm_saturation(model.hidden_size, model.norm_epsilon, model.qk_norm, stds)
    if runtime.is_main:
        folder.write_init_report(as_json(matrices, roles, saturation, config.init))
        print(table(roles))
        print("\n".join(saturation_lines(saturation, config.model.norm_epsilon)), flush=True)
    check(matrices, config.init.max_z)


@dataclass
class _Resume:
    """The checkpoint that a run resumes from."""

    folder: Path
    manifest: dict[str, Any]
    notes: list[str]
    """What was wrong with newer ones, and what else a user must know."""
    changed: list[str]
    """Options that have other values than before."""
    not_finite: Path | None = None
    """A newer one that was set aside, since the loss after loading it is not finite."""
    is_branch: bool = False
    """Whether it is another run's, which this one starts from."""


def _find_resume(
    config: Config, runtime: Runtime, folder: RunFolder, fingerprint: str, before: int | None = None
) -> _Resume | None:
    found = retention.newest_valid(runtime, folder.checkpoints, config.checkpoint.on_damage == "previous", before)
    if found is None:
        return None
    changed = _check_same_run(folder.path, config, found.folder, found.manifest, fingerprint)
    return _Resume(found.folder, found.manifest, found.notes, changed)


def _find_branch(config: Config, runtime: Runtime, fingerprint: str, steps: int) -> _Resume:
    """The checkpoint of another run that run.branch_from names.

    Raises:
        CheckpointError: none is there, it is corrupt, of another model, or at or past the last step of this run.
    """
    where = f"run.branch_from={config.run.branch_from}"
    folder = Path(runtime.run_on_rank0(lambda: str(checkpoint_folders(Path(config.run.branch_from))[-1])))
    manifest = retention.require_valid(runtime, folder)
    changed = _check_same_run(Path(config.run.folder), config, folder, manifest, fingerprint, where)
    if manifest["step"] >= steps:
        raise CheckpointError(
            f"{where}: is at step {manifest['step']}, and this run ends at step {steps}: its steps count from the trunk's "
            "first: raise run.steps or run.tokens, or branch from an earlier checkpoint"
        )
    return _Resume(folder, manifest, [], changed, is_branch=True)


def _first_loss(engine: Engine, data: RunData, resume: _Resume) -> float:
    """Loss of the next global batch, without its step."""
    config, runtime, consumed = engine.config, engine.runtime, resume.manifest["consumed_samples"]
    size, micro = batch_size(config.data, consumed), config.data.micro_batch_size
    return engine.loss(rank_microbatches(data.train, consumed, size, micro, runtime.data_rank, runtime.data_size))


def _load_finite(engine: Engine, data: RunData, folder: RunFolder, resume: _Resume) -> _Resume:
    """Load a checkpoint, or the one before it when the loss right after loading is not finite; all ranks call it.

    The bad one is not deleted: it gets another name. Where there is none before, the guard does what its policy says.

    Raises:
        CheckpointError: the loss after the one before is not finite either.

    Returns:
        What was loaded.
    """
    config, runtime = engine.config, engine.runtime
    saver.load(engine, resume.folder, resume.manifest)
    if resume.manifest["step"] >= total_steps(config) or math.isfinite(_first_loss(engine, data, resume)):
        return resume
    what = f"{resume.folder}: the loss of the first step after loading it is not finite"
    if resume.is_branch:  # another run's: neither renamed nor replaced
        raise CheckpointError(f"run.branch_from: {what}: branch from an earlier checkpoint")
    earlier = _find_resume(config, runtime, folder, data.fingerprint, before=resume.manifest["step"])
    if earlier is None:
        resume.notes.append(f"{what}, and there is no checkpoint before it")
        return resume
    saver.load(engine, earlier.folder, earlier.manifest)
    if not math.isfinite(_first_loss(engine, data, earlier)):
        raise CheckpointError(
            f"{what}, and neither is it after {earlier.folder.name}: look at both with tools/checkpoint.py inspect, and at "
            "the data; delete or rename what is bad to resume from an earlier one"
        )
    aside = retention.set_aside(runtime, resume.folder, "not_finite")
    earlier.not_finite = resume.folder
    earlier.notes.insert(0, f"{what}: it is kept as {aside.name}; resuming from {earlier.folder.name}")
    return earlier


def prepare_session(config: Config, runtime: Runtime, open_data: Callable[[Config], RunData]) -> Session:
    """Open the data, build, fill and lay out the model, and resume if there is a checkpoint.

    Args:
        config: resolved, and validated for the world's size; its vocabulary is filled in when it was left to the data.
        runtime: this process, its groups formed.
        open_data: opens the run's data.

    Raises:
        MegagammaError: one clear reason, before a step is made and with everything that was there untouched.
    """
    runtime.run_on_rank0(lambda: check_folder(config.run))
    lock = RunLock(config.run.folder)
    runtime.run_on_rank0(lock.acquire)
    try:
        return _prepare_locked(config, runtime, open_data, lock)
    except BaseException:
        lock.release()
        raise


def _prepare_locked(config: Config, runtime: Runtime, open_data: Callable[[Config], RunData], lock: RunLock) -> Session:
    folder = RunFolder(config.run.folder)
    data = runtime.run_on_all_ranks(lambda: open_data(config))
    if config.model.vocab_size is None:
        config.model.vocab_size = data.vocab_size
    check_fits(config, runtime.size)  # again, now that the vocabulary is known
    resume = _find_resume(config, runtime, folder, data.fingerprint)
    if resume is None and config.run.branch_from:
        resume = _find_branch(config, runtime, data.fingerprint, total_steps(config))
    resumes = resume is not None and not resume.is_branch
    choices = choose(config, runtime, runtime.run_on_rank0(folder.chosen) if resumes else None)

    begin = time.perf_counter()
    chunks, parameter_map = build(config, runtime, choices.dtype, choices.compiled)
    if resume is None:
        _initialize(config, runtime, parameter_map, folder)
    else:
        parameter_map.mark_tensor_parallel()
    engine = Engine(config, runtime, chunks, parameter_map, parameter_groups(parameter_map, config))
    step = 0
    if resume is not None:
        resume = _load_finite(engine, data, folder, resume)
        manifest = resume.manifest
        step = manifest["step"]
    elif choices.dtype != torch.float32:
        refine_masters(engine, config)
    origin = provenance(config.parallel, runtime.data_size, runtime.threads, runtime.gather_devices())
    start_step = None if resume is None or resume.is_branch else step
    reporter = Reporter(folder.path, config.logging, config.run.name, as_dict(config), runtime.is_main, start_step)
    session = Session(config, runtime, data, engine, reporter, folder, lock, total_steps(config), step)
    if resume is not None:
        session.consumed, session.seconds = manifest["consumed_samples"], manifest["seconds"]
        session.progress = manifest["progress"]
    if runtime.is_main:
        kept = folder.write_config(config)
        if kept is not None:
            reporter.warn(
                f"{folder.config_file} was written by hand and is the run's own from here on: kept as {kept.name}"
            )
        folder.write_resolved(resolved_values(session) | choices.as_json())
        folder.write_provenance(origin)
        if data.codec is not None:
            folder.write_tokenizer(data.codec.path)
    _report_start(session, resume, choices, time.perf_counter() - begin)
    return session


def resolved_values(session: Session) -> dict[str, Any]:
    """Content of resolved.json: what the config became on this machine, as plain JSON values."""
    config, runtime, engine = session.config, session.runtime, session.engine
    parallel = config.parallel
    return {
        "device": runtime.device.type,
        "zero_stage": engine.zero_stage,
        "parallel": {
            "world": runtime.size,
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline or 1,
            "sequence": parallel.sequence,
            "context": parallel.context,
            "data": runtime.data_size,
        },
        "threads": runtime.threads,
        "steps": session.steps,
        "vocab_size": config.model.vocab_size,
        "padded_vocab_size": padded_vocab_size(config.model),
        "deepspeed": engine.deepspeed_config,
        "packages": installed_versions(),
    }


def _report_start(session: Session, resume: _Resume | None, choices: Choices, seconds: float) -> None:
    reporter = session.reporter
    for line in choices.lines:
        reporter.print(line)
    if session.data.checked:
        reporter.print(session.data.checked)
    for line in describe_groups(session.engine.map, session.config):
        reporter.print(line)
    if resume is not None:
        for text in resume.notes:
            reporter.warn(text)
        if resume.not_finite is not None:
            reporter.event("went_back", step=session.step, not_finite=resume.not_finite.name, folder=resume.folder.name)
        if resume.changed:
            what = (
                "branching with other options than the trunk"
                if resume.is_branch
                else "resuming with other options than before"
            )
            reporter.warn(f"{what}: {'; '.join(resume.changed)}")
    if resume is not None and resume.is_branch:
        reporter.event(
            "branch", step=session.step, checkpoint=str(resume.folder.absolute()), hash=resume.manifest.get("checksum")
        )
        reporter.print(f"branching from {resume.folder} at step {session.step}")
    kind = "start" if resume is None or resume.is_branch else "resume"
    reporter.event(kind, step=session.step, seconds_to_build=seconds, pid=os.getpid())


def refine_masters(engine: Engine, config: Config) -> None:
    """Draw the fp32 master weights anew: DeepSpeed made them from weights that were rounded to bf16."""
    for tensor in engine.map:
        exact = torch.empty(tensor.shape, dtype=torch.float32, device=engine.runtime.device)
        draw(tensor, exact, config)
        engine.state.set(tensor, "weight", exact)
