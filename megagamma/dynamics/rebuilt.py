"""A checkpoint's model, built again on this process alone, for what needs its forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megagamma.config.resolve import resolve
from megagamma.config.schema import ParallelConfig
from megagamma.errors import MegagammaError


@contextmanager
def rebuilt(folder: Path) -> Iterator[tuple[Any, Any]]:
    """(engine, data) of a checkpoint of any layout, in the dtype that its run used; gone after the block.

    Raises:
        MegagammaError: the run's held-out data are not on this machine, or it has none.
    """
    from megagamma.checkpoint.manifest import stored_config
    from megagamma.checkpoint.reader import read_manifest
    from megagamma.checkpoint.saver import load
    from megagamma.data.sources import open_data
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.runs.folder import RunFolder
    from megagamma.training.assembly import fresh_engine

    manifest = read_manifest(folder)
    config = copy.deepcopy(stored_config(folder, manifest))
    run = RunFolder.of_checkpoint(folder)
    chosen = run.chosen() if run is not None else {}
    dtypes: dict[str, Any] = {"bfloat16": "bf16", "float32": "fp32"}
    config.precision.dtype = dtypes.get(chosen.get("dtype", ""), config.precision.dtype)
    config.parallel, config.deepspeed_config, config.run.compile = ParallelConfig(), "auto", "off"
    config = resolve(config)
    data = open_data(config)
    if not data.validation:
        raise MegagammaError(f"{folder}: its run has no held-out data, and this needs some: give another run")
    engine = fresh_engine(config, Runtime(config, world_from_environment()))
    try:
        load(engine, folder, manifest)
        yield engine, data
    finally:
        engine.close()


def activations_of_checkpoint(folder: Path) -> dict[str, Any]:
    """`measure_activations` of a checkpoint, on the probe that its run used.

    Raises:
        MegagammaError: see `rebuilt`.
    """
    from megagamma.dynamics.activations import measure_activations, probe_batches

    with rebuilt(folder) as (engine, data):
        return measure_activations(engine, probe_batches(next(iter(data.validation.values())), 1))
