"""Everything between a validated config and the first step: data, model, weights, engine, resume."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megagamma.checkpoint import reader as reading
from megagamma.checkpoint import saver as checkpoint
from megagamma.config.io import as_dict, differences, from_dict, save_config
from megagamma.config.resolve import planned_dtype
from megagamma.config.schema import Config
from megagamma.data.schedule import total_steps
from megagamma.data.sources import RunData, open_data
from megagamma.distributed.engine import Engine
from megagamma.distributed.runtime import Runtime
from megagamma.distributed.state import partition_writer
from megagamma.errors import CheckpointError, ConfigurationError
from megagamma.evaluation.callback import check_harness
from megagamma.files import copy_file, require_writable, write_json
from megagamma.initialization.report import (
    MatrixReport,
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
from megagamma.runs.provenance import provenance
from megagamma.training.assembly import build
from megagamma.training.optimizer import describe_groups, parameter_groups


def choose_dtype(config: Config, data_size: int, device: torch.device) -> tuple[torch.dtype, str | None]:
    """`precision.dtype` as a dtype, and a warning with the measured ratio for bf16 on a CPU."""
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    if planned_dtype(config, data_size, kind) == "fp32":
        return torch.float32, None
    if kind == "cuda":
        return torch.bfloat16, None
    ratio = matmul_speed(torch.bfloat16) / matmul_speed(torch.float32)
    advice = "use --precision.dtype fp32" if ratio < 1 else "which loses precision against fp32"
    return (
        torch.bfloat16,
        f"precision.dtype=bf16 on a CPU: its matrix products run at {ratio:.2f} x fp32 here: {advice}",
    )


def matmul_speed(dtype: torch.dtype, size: int = 512, repeats: int = 3) -> float:
    """Best rate of a few square matrix products on the CPU. Unit: FLOP/s."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


@dataclass
class Session:
    """A run that is ready for its next step."""

    config: Config
    runtime: Runtime
    data: RunData
    engine: Engine
    reporter: Reporter
    folder: Path
    steps: int
    step: int = 0
    consumed: int = 0
    seconds: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"


def _check_folder(config: Config) -> None:
    """Check that the run's folder can be used as asked. Runs on rank 0.

    Raises:
        ConfigurationError, CheckpointError, MegagammaError: the folder cannot be used as asked.
    """
    folder = Path(config.run.folder)
    saved = reading.steps_saved(folder / "checkpoints")
    mode = config.run.resume
    if mode == "never" and (saved or (folder / "metrics.jsonl").exists()):
        raise ConfigurationError(
            f"run.folder={folder} holds a run already, and run.resume=never: choose another folder, or --run.resume auto"
        )
    if mode == "must" and not saved:
        raise CheckpointError(
            f"run.folder={folder} holds no finished checkpoint, and run.resume=must: check the folder's name, or use "
            "--run.resume auto"
        )
    require_writable(folder, "run.folder")


# What a checkpoint belongs to: another value here is another model, or another experiment under the same name.
_FIXED_SECTIONS = ("model", "init")


def _check_same_run(folder: Path, config: Config, manifest: dict[str, Any], fingerprint: str) -> list[str]:
    """Refuse a resume with another model; returns other knobs that changed.

    Raises:
        CheckpointError: naming the knobs, with both values.
    """
    if manifest["tokenizer"] not in (fingerprint, ""):  # a model imported without one takes any
        raise CheckpointError(
            f"run.folder={folder}: its checkpoint was trained with tokenizer {manifest['tokenizer'][:12]}, the data has "
            f"{fingerprint[:12]}: give the same data, or another run.folder"
        )
    saved = from_dict(manifest["config"])
    changed = differences(saved, config, _FIXED_SECTIONS)
    if changed or saved.run.seed != config.run.seed:
        changed = changed or [f"run.seed: {saved.run.seed} -> {config.run.seed}"]
        raise CheckpointError(
            f"run.folder={folder} holds a checkpoint of another model ({'; '.join(changed)}): give the same values, or "
            "another run.folder"
        )
    return differences(saved, config, ("data", "optimizer", "schedule"))


def _initialize(config: Config, runtime: Runtime, parameter_map: ParameterMap, folder: Path) -> list[MatrixReport]:
    """Fill the weights and report what was drawn; refuses weights that are not what was asked for."""
    drawn = fill(parameter_map, config, partition_writer(runtime))
    matrices = report_drawn(drawn, config, runtime.gather_over_model)
    roles = by_role(matrices, config.init)
    saturation = norm_saturation(config.model, {row.role: row.asked_std for row in roles})
    if runtime.is_main:
        write_json(folder / "init_report.json", as_json(matrices, roles, saturation, config.init))
        print(table(roles))
        print("\n".join(saturation_lines(saturation, config.model.norm_epsilon)), flush=True)
    check(matrices, config.init.max_z)
    return matrices


def prepare_session(config: Config) -> Session:
    """Join the process groups, open the data, build, fill and lay out the model, and resume if there is a checkpoint.

    Raises:
        MegagammaError: one clear reason, before a step is made and with everything that was there untouched.
    """
    runtime = Runtime(config)
    runtime.on_main(lambda: _check_folder(config))
    runtime.on_main(lambda: check_harness(config))
    folder = Path(config.run.folder)
    data = runtime.together(lambda: open_data(config))
    check_fits(config, runtime.size)  # again, now that the vocabulary is known
    steps = total_steps(config)
    dtype, warning = choose_dtype(config, runtime.data_size, runtime.device)
    manifest = None
    changed: list[str] = []
    found = checkpoint.newest_sound(runtime, folder / "checkpoints", config.checkpoint.on_damage == "previous")
    if found is not None:
        source, damaged = found
        manifest = reading.read_manifest(source)
        changed = _check_same_run(folder, config, manifest, data.tokenizer.fingerprint)

    begin = time.perf_counter()
    chunks, parameter_map = build(config, runtime, dtype)
    if manifest is None:
        _initialize(config, runtime, parameter_map, folder)
    else:
        parameter_map.mark_tensor_parallel()
    engine = Engine(config, runtime, chunks, parameter_map, parameter_groups(parameter_map, config.optimizer))
    session = Session(config, runtime, data, engine, None, folder, steps)  # type: ignore[arg-type]
    if manifest is not None:
        manifest = checkpoint.load(engine, source)
        session.step, session.consumed = manifest["step"], manifest["consumed_samples"]
        session.seconds, session.progress = manifest["seconds"], manifest["progress"]
    elif dtype != torch.float32:
        _refine_masters(engine, config)
    origin = provenance(config, runtime)
    name = config.run.name
    session.reporter = Reporter(folder, config.logging, name, as_dict(config), runtime.is_main, session.step)
    if runtime.is_main:
        save_config(config, folder / "config.yaml")
        # The run's folder tells all that an export needs, when the data is elsewhere.
        copy_file(data.tokenizer.path, folder / "tokenizer.model")
        write_json(folder / "provenance.json", origin)
        if warning:
            session.reporter.warn(warning)
        for line in describe_groups(parameter_map, config.optimizer):
            session.reporter.say(line)
        for text in damaged if found is not None else []:
            session.reporter.warn(f"{text}: resuming from {source.name}")
        if changed:
            session.reporter.warn(f"resuming with other knobs than before: {'; '.join(changed)}")
        kind = "start" if manifest is None else "resume"
        session.reporter.event(kind, step=session.step, seconds_to_build=time.perf_counter() - begin, pid=os.getpid())
    return session


def _refine_masters(engine: Engine, config: Config) -> None:
    """Draw the fp32 master weights anew: DeepSpeed made them from weights that were rounded to bf16."""
    for tensor in engine.map:
        exact = torch.empty(tensor.shape, dtype=torch.float32, device=engine.runtime.device)
        draw(tensor, exact, config)
        engine.state.set(tensor, "weight", exact)
