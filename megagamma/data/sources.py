"""Config -> the run's data: prepared folders, training batches, validation sets, tokenizer."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from megagamma.config.schema import Config
from megagamma.data.blend import Blend
from megagamma.data.contracts import EvaluationSet, TextCodec, TrainingSource
from megagamma.data.preparation.indexing import read_manifest, verify_prepared
from megagamma.data.preparation.prepare import embedded_settings, prepare
from megagamma.data.text import Corpus, CorpusSampler
from megagamma.data.text_batches import TextEvaluation, TextSource, collate_options
from megagamma.data.tokenizer import Tokenizer
from megagamma.environment import world_from_environment
from megagamma.errors import ConfigurationError, DataError

_FULL_BYTES = 1 << 30
"""Up to this size of a folder, `data.verify=auto` reads all tokens: seconds."""


def prepared_folders(config: Config) -> list[str]:
    """The training folders; an embedded corpus is prepared first if it is not there yet.

    Raises:
        DataError: a folder that is missing or corrupt.
    """
    if not config.data.corpus:
        for folder in config.data.paths:
            verify_prepared(folder)
        return list(config.data.paths)
    settings = embedded_settings(config.data.corpus, config.data.cache, vocab_size=config.tokenizer.vocab_size)
    return [str(prepare(settings))]


@dataclass
class RunData:
    """Everything a run reads. What `open_data` makes of prepared text, a function of one's own can make of anything."""

    train: TrainingSource
    validation: dict[str, EvaluationSet]
    codec: TextCodec | None
    """None for data that are no text: nothing is sampled, and no benchmark can be scored."""
    vocab_size: int
    fingerprint: str
    """Of the vocabulary, hexadecimal: a checkpoint resumes only with data of the same one."""
    checked: str = ""
    """What of the files was checked, as a line for the console; empty: nothing is said."""


def tokenizer_of(folders: list[str], config: Config) -> Tokenizer:
    """The tokenizer that all folders were written with.

    Raises:
        DataError: the folders disagree, or tokenizer.path names another one.
        ConfigurationError: model.vocab_size is smaller than the tokenizer's vocabulary.
    """
    tokenizer = Tokenizer(Path(folders[0]) / "tokenizer.model")
    for folder in folders[1:]:
        other = Tokenizer(Path(folder) / "tokenizer.model")
        if other.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"data.paths: {folder} was written with tokenizer {other.fingerprint[:12]}, {folders[0]} with "
                f"{tokenizer.fingerprint[:12]}: prepare them with one tokenizer (tools/prepare_data.py --tokenizer)"
            )
    if config.tokenizer.path:
        asked = Tokenizer(config.tokenizer.path)
        if asked.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"tokenizer.path={config.tokenizer.path} ({asked.fingerprint[:12]}) does not match {folders[0]} "
                f"({tokenizer.fingerprint[:12]}): give the tokenizer that the data was prepared with, or none"
            )
    asked_size = config.model.vocab_size
    if asked_size is not None and asked_size < tokenizer.vocab_size:
        raise ConfigurationError(
            f"model.vocab_size={asked_size} is smaller than the tokenizer's {tokenizer.vocab_size}: leave it out, or "
            f"use {tokenizer.vocab_size} or more"
        )
    return tokenizer


def open_data(config: Config) -> RunData:
    """Open a run's prepared text.

    Raises:
        DataError, ConfigurationError: see `prepared_folders`, `tokenizer_of` and `CorpusSampler`.
    """
    folders = prepared_folders(config)
    tokenizer = tokenizer_of(folders, config)
    data = config.data
    names = dict(config.validation.paths)
    if not names:
        for folder in folders:
            if os.path.exists(os.path.join(folder, "validation.bin")):
                name = os.path.basename(os.path.normpath(folder))
                names[name if name not in names else f"{name}_{len(names)}"] = folder
    manifests, checked = _verify_all([*folders, *names.values()], data.verify)
    # Named by position, so that a folder can move without changing the order of its samples.
    samplers = [
        CorpusSampler(
            Corpus(folder, "train", manifests[folder]), data.sequence_length, config.run.seed, name=f"corpus{index}"
        )
        for index, folder in enumerate(folders)
    ]
    options = collate_options(data)
    train = TextSource(Blend(samplers, data.weights), **options)
    validation: dict[str, EvaluationSet] = {}
    for name, folder in names.items():
        if Tokenizer(Path(folder) / "tokenizer.model").fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"validation.paths: {name}={folder} was written with another tokenizer than the training data: "
                "prepare it with --tokenizer"
            )
        corpus = Corpus(folder, "validation", manifests[folder])
        validation[name] = TextEvaluation(corpus, data.sequence_length, **options)
    for folder, manifest in manifests.items():
        _check_vocabulary(folder, manifest["tokenizer"], tokenizer)
    return RunData(train, validation, tokenizer, tokenizer.vocab_size, tokenizer.fingerprint, checked)


def _verify_all(folders: list[str], verify: str) -> tuple[dict[str, dict], str]:
    """Check prepared folders; returns their manifests, and what was checked as a line for the console.

    The tokens are read by the first process of each host alone.

    Args:
        verify: `data.verify`.

    Raises:
        DataError: see `verify_prepared`.
    """
    began, is_first = time.perf_counter(), world_from_environment().local_rank == 0
    manifests: dict[str, dict] = {}
    full: list[str] = []
    read = 0
    for folder in dict.fromkeys(folders):
        size = sum(entry["bytes"] for entry in read_manifest(folder)["files"].values())
        whole = verify == "full" or (verify == "auto" and size <= _FULL_BYTES)
        manifests[folder] = verify_prepared(folder, full=whole and is_first)
        if whole:
            full.append(folder)
            read += size
    others = len(manifests) - len(full)
    text = f"data checked in {time.perf_counter() - began:.1f} s: indices of {len(manifests)} prepared folders"
    if full:
        text += f", and checksums of all tokens of {len(full)} ({read / 2**20:,.1f} MiB)"
    if others:
        text += f"; the tokens of {others} are not (--data.verify full does, or tools/prepare_data.py --verify)"
    return manifests, text


def _check_vocabulary(folder: str, recorded: dict, tokenizer: Tokenizer) -> None:
    """Refuse a manifest whose numbers are not those of the tokenizer whose fingerprint it has."""
    for name in ("vocab_size", "eos_id", "pad_id"):
        if recorded[name] != getattr(tokenizer, name):
            raise DataError(
                f"data: '{folder}/manifest.json': tokenizer.{name}={recorded[name]}, its tokenizer.model has "
                f"{getattr(tokenizer, name)}: copy the folder again or prepare it again with --overwrite"
            )
