"""What a Hugging Face folder holds: where the model comes from, the hash of its content, and whether it is proven."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megagamma.checkpoint.reader import CheckpointReader
from megagamma.config.schema import Config
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import read_json
from megagamma.huggingface.contents import PARITY, altered_files, check_unaltered, file_hashes, is_export
from megagamma.huggingface.formats import Exported
from megagamma.huggingface.importing import HuggingFaceWeights
from megagamma.owned import require_own, require_place
from megagamma.planning.flops import parameter_counts

CARRIED = ("eval",)
"""Folders inside an exported model that outlive a new conversion: the scores that scoring it writes there."""


def weights_hash(reader: CheckpointReader) -> str:
    """A hash of the weights of a checkpoint, equal for equal files. Hexadecimal."""
    digests = sorted(entry["xxh3_128"] for entry in reader.manifest["files"] if entry["kind"] == "weight")
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32]


def checkpoint_provenance(reader: CheckpointReader, config: Config) -> dict[str, Any]:
    """Where an exported model comes from; kept in its config.json under "megagamma", and shown in its card."""
    return {
        "name": config.run.name,
        "step": reader.manifest["step"],
        "tokens": reader.manifest["consumed_samples"] * config.data.sequence_length,
        "gamma": config.init.gamma,
        "init": asdict(config.init),
        "seed": config.run.seed,
        "parameters": parameter_counts(config.model).total,
        "weights": weights_hash(reader),
    }


def export_hash(reader: CheckpointReader, values: dict[str, Any], tokenizer: Tokenizer | None) -> str:
    """A hash of an exported model: its weights, its config.json `values` without provenance, its tokenizer."""
    described = {key: value for key, value in values.items() if key != "megagamma"}
    contents = [
        weights_hash(reader),
        json.dumps(described, sort_keys=True),
        tokenizer.fingerprint if tokenizer else "",
    ]
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()[:32]


def exported_provenance(folder: Path) -> dict[str, Any]:
    """`checkpoint_provenance` of an exported folder, with its eos_token_id; empty where another program wrote it.

    Raises:
        MegagammaError: there is no config.json, or it cannot be read.
    """
    values = read_json(folder / "config.json")
    provenance = values.get("megagamma")
    return {**provenance, "eos_token_id": values.get("eos_token_id")} if isinstance(provenance, dict) else {}


def folder_hash(folder: Path) -> str:
    """A hash of the content of any Hugging Face folder: config, weights, tokenizer and code. Reads every file.

    Of an exported model it is the hash that the export gave it, once every file has been compared with its proof.

    Raises:
        ConfigurationError: it is an exported model and was altered.
        MegagammaError: a file cannot be read.
    """
    found = file_hashes(folder)
    if check_unaltered(folder, found) and (identity := exported_provenance(folder).get("identity")):
        return str(identity)
    digest = hashlib.sha256()
    for name, content in found.items():
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:32]


def is_proven(folder: Path, content_hash: str, tensors: list[Exported], *, tolerance: float, whole_model: bool) -> bool:
    """Whether a folder is this exported model, complete and unaltered, with a parity that is strict enough.

    Args:
        content_hash: from `export_hash`.
        tensors: all that it must hold.
        tolerance: the parity's may not be larger.
        whole_model: a parity of sampled layers does not suffice.
    """
    if not is_export(folder):
        return False
    try:
        provenance, parity = exported_provenance(folder), read_json(folder / PARITY)
        strict = parity.get("holds") is True and _is_at_most(parity.get("tolerance"), tolerance)
        enough = not whole_model or parity.get("compared") == "whole model"
        if not (strict and enough and provenance.get("identity") == content_hash):
            return False
        names = HuggingFaceWeights(folder).names()
        return names == {tensor.name for tensor in tensors} and altered_files(folder) == []
    except MegagammaError:
        return False


def _is_at_most(value: Any, limit: float) -> bool:
    return isinstance(value, int | float) and value <= limit


def check_destination(output: Path, source: Path, overwrite: bool, option: str = "--out") -> None:
    """Refuse to write where something else would be lost.

    Args:
        output: folder to write.
        source: checkpoint that is read.
        overwrite: whether an exported model there may be replaced.

    Raises:
        ConfigurationError: naming what is there.
    """
    if source.resolve().is_relative_to(output.resolve()):
        raise ConfigurationError(f"{option} {output}: holds the checkpoint {source} itself: choose another folder")
    # Where a checkpoint alone, outside a run, is converted by default.
    if output.resolve() != source.resolve() / "hf" / source.resolve().name:
        require_place(output, f"{option} {output}", itself=("exported model",), around=("run",))
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output.is_dir() and is_export(output)):
        kind = "is a file" if not output.is_dir() else "holds files, and is no exported model"
        raise ConfigurationError(f"{option} {output}: {kind}: choose another folder")
    if not overwrite:
        raise ConfigurationError(
            f"{option} {output}: holds another export: use --overwrite to replace it, or another folder"
        )
    require_own(output, f"{option} {output}", CARRIED)
