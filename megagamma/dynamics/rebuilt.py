"""A saved model, built again on this process alone, for what needs its forward pass or held-out text."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megagamma.config.resolve import resolve
from megagamma.config.schema import Config, ParallelConfig
from megagamma.dynamics.embeddings import Signatures, signatures
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.runs.folder import RunFolder


def _stored(folder: Path) -> tuple[Config, dict[str, Any]]:
    """(config as it was given, manifest) of a checkpoint."""
    from megagamma.checkpoint.manifest import stored_config
    from megagamma.checkpoint.reader import read_manifest

    manifest = read_manifest(folder)
    return copy.deepcopy(stored_config(folder, manifest)), manifest


def _take_text(config: Config, text: Config) -> None:
    """Let a model read another run's data, at that run's length."""
    config.data, config.tokenizer, config.validation = text.data, text.tokenizer, text.validation


def _opened(folder: Path, config: Config, tokenizer: str) -> Any:
    """A config's data.

    Raises:
        MegagammaError: they are not on this machine, hold nothing out, or are of another tokenizer.
    """
    from megagamma.inputs import open_data

    data = open_data(config)
    if not data.validation:
        raise MegagammaError(f"{folder}: its run has no held-out data, and this needs some: give another run")
    if tokenizer and data.fingerprint != tokenizer:
        raise ConfigurationError(
            f"{folder}: its tokenizer {tokenizer[:12]} is not that of the text, {data.fingerprint[:12]}: give --text a run "
            "of the same tokenizer"
        )
    size = config.model.vocab_size
    if size is not None and data.vocab_size > size:
        raise ConfigurationError(
            f"{folder}: its vocabulary of {size} is smaller than the text's, {data.vocab_size}: give --text a run of the "
            "same tokenizer"
        )
    return data


@contextmanager
def rebuilt(folder: Path, text: RunFolder | None = None) -> Iterator[tuple[Any, Any]]:
    """(engine, data) of a checkpoint of any layout, in the dtype that its run used; gone after the block.

    Args:
        folder: the checkpoint.
        text: the run whose data, length and dtype are taken; None: the checkpoint's own.

    Raises:
        MegagammaError: the run's held-out data are not on this machine, or it has none, or of another tokenizer.
    """
    from megagamma.checkpoint.saver import load
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.training.assembly import fresh_engine

    config, manifest = _stored(folder)
    run = RunFolder.of_checkpoint(folder) if text is None else text
    chosen = run.chosen() if run is not None else {}
    dtypes: dict[str, Any] = {"bfloat16": "bf16", "float32": "fp32"}
    config.precision.dtype = dtypes.get(chosen.get("dtype", ""), config.precision.dtype)
    config.parallel, config.deepspeed_config, config.run.compile = ParallelConfig(), "auto", "off"
    if text is not None:
        _take_text(config, text.read_config())
    config = resolve(config)
    data = _opened(folder, config, manifest["tokenizer"])
    engine = fresh_engine(config, Runtime(config, world_from_environment()))
    try:
        load(engine, folder, manifest)
        yield engine, data
    finally:
        engine.close()


def activations_of_checkpoint(folder: Path, text: RunFolder | None = None) -> dict[str, Any]:
    """`measure_activations` of a checkpoint, on the probe that its run used, or on another run's.

    Raises:
        MegagammaError: see `rebuilt`.
    """
    from megagamma.dynamics.activations import measure_activations, probe_batches

    with rebuilt(folder, text) as (engine, data):
        return measure_activations(engine, probe_batches(next(iter(data.validation.values())), 1))


def activations_of_huggingface(folder: Path, text: RunFolder) -> dict[str, Any]:
    """The same of a Hugging Face folder, by its import into a folder that is gone afterwards.

    Raises:
        MegagammaError: see `rebuilt` and `megagamma.huggingface.importing.import_model`.
    """
    from megagamma.huggingface.importing import import_model

    with tempfile.TemporaryDirectory(prefix="megagamma-") as place:
        return activations_of_checkpoint(import_model(folder, Path(place) / "run", quiet=True), text)


def frequent_tokens(config: Config, where: Path) -> Signatures:
    """`signatures` of a config's held-out text.

    Raises:
        MegagammaError: it is not on this machine, or there is none.
    """
    config = resolve(config)
    data = _opened(where, config, "")
    return signatures(next(iter(data.validation.values())), config.model.vocab_size or data.vocab_size)
