"""A checkpoint's model, built again on this process alone, for what needs its forward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from megagamma.config.resolve import resolve
from megagamma.config.schema import ParallelConfig
from megagamma.errors import MegagammaError


def activations_of_checkpoint(folder: Path) -> dict[str, Any]:
    """`measure_activations` of a checkpoint of any layout, on the probe that its run used, in the dtype that it used.

    Raises:
        MegagammaError: the run's held-out data are not on this machine, or it has none.
    """
    from megagamma.checkpoint.manifest import stored_config
    from megagamma.checkpoint.reader import read_manifest
    from megagamma.checkpoint.saver import load
    from megagamma.data.sources import open_data
    from megagamma.distributed.runtime import Runtime
    from megagamma.dynamics.activations import measure_activations, probe_batches
    from megagamma.environment import world_from_environment
    from megagamma.runs.folder import RunFolder
    from megagamma.training.assembly import fresh_engine

    manifest = read_manifest(folder)
    config = copy.deepcopy(stored_config(folder, manifest))
    run = RunFolder.of_checkpoint(folder)
    chosen = run.chosen() if run is not None else {}
    config.precision.dtype = {"bfloat16": "bf16", "float32": "fp32"}.get(
        chosen.get("dtype", ""), config.precision.dtype
    )  # type: ignore[assignment]
    config.parallel, config.deepspeed_config, config.run.compile = ParallelConfig(), "auto", "off"
    config = resolve(config)
    data = open_data(config)
    if not data.validation:
        raise MegagammaError(
            f"{folder}: its run has no held-out data to probe it with: leave out the instrument activations"
        )
    runtime = Runtime(config, world_from_environment())
    engine = fresh_engine(config, runtime)
    try:
        load(engine, folder, manifest)
        return measure_activations(engine, probe_batches(next(iter(data.validation.values())), 1))
    finally:
        engine.close()
