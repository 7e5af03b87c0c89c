"""A checkpoint of ours -> a folder that transformers loads, written matrix by matrix and published only when proven equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megagamma.checkpoint.reader import CheckpointReader, verify
from megagamma.checkpoint.safetensors_writer import DTYPES, ShardWriter
from megagamma.config.io import from_dict
from megagamma.config.resolve import resolve
from megagamma.config.schema import Config
from megagamma.data.preparation.prepare import embedded_settings
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import CheckpointError, ConfigurationError, MegagammaError
from megagamma.files import advice, copy_file, read_json, write_json, write_text
from megagamma.huggingface.card import model_card
from megagamma.huggingface.formats import (
    Exported,
    Format,
    choose_format,
    export_config,
    export_tensor,
    exported_tensors,
)
from megagamma.huggingface.importing import INDEX, HuggingFaceWeights
from megagamma.huggingface.native import Answer, Question, outputs_apart
from megagamma.huggingface.parity import TOLERANCE, ParityError, compare, free_memory, needed_bytes, sampled_layers
from megagamma.huggingface.publishing import check_destination, is_export, publishing
from megagamma.huggingface.tokenizer import export_tokenizer, special_ids
from megagamma.planning.flops import parameter_counts


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported."""

    dtype: torch.dtype = torch.float32
    """Of the written weights."""
    hf_class: str | None = None
    """Key of a class in `huggingface.FORMATS`; None: the first that can hold the model."""
    custom_code: bool = False
    """Allow a class that Hugging Face does not have."""
    tokenizer: str | None = None
    """A SentencePiece file, or "none" to export without one; None: the run's."""
    max_shard_bytes: int = 5_000_000_000
    """A file of weights is closed before it would grow beyond this, unless one tensor alone does."""
    parity: str = "auto"
    """"full", "layers" (a sample of them, each alone), or "auto": full when it fits in memory."""
    tolerance: float = TOLERANCE
    device: str = "cpu"
    """Device of the comparison."""
    overwrite: bool = False
    """Replace another exported model that is there."""


def read_checkpoint(folder: Path) -> tuple[CheckpointReader, Config]:
    """A finished checkpoint and its run's config; its weights are not read yet, see `verify_weights`.

    Raises:
        CheckpointError: it is missing, unfinished, or its config names no vocabulary.
    """
    reader = CheckpointReader(folder)
    config = resolve(from_dict(reader.manifest["config"]))
    if config.model.vocab_size is None:
        raise CheckpointError(
            f"{folder}: its config names no model.vocab_size: the checkpoint was not written by a run"
        )
    return reader, config


def verify_weights(reader: CheckpointReader) -> None:
    """Check that the files of weights are what was written.

    Raises:
        CheckpointError: naming the first that is missing, cut off or altered.
    """
    weights = [entry for entry in reader.manifest["files"] if entry["kind"] == "weight"]
    verify(reader.folder, {**reader.manifest, "files": weights})


def weights_identity(reader: CheckpointReader) -> str:
    """A name for the weights of a checkpoint, equal for equal files. Hexadecimal."""
    digests = sorted(entry["xxh3_128"] for entry in reader.manifest["files"] if entry["kind"] == "weight")
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32]


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, when the checkpoint still lies in it."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / "config.yaml").exists() else None


def find_tokenizer(checkpoint: Path, config: Config, fingerprint: str, given: str | None) -> Tokenizer | None:
    """The tokenizer that the weights were trained with: in the run's folder, or beside its data.

    Raises:
        ConfigurationError: it is not there, or the one given is another.
    """
    if given == "none":
        return None
    if given is not None:
        found = Tokenizer(given)
        if fingerprint and found.fingerprint != fingerprint:
            raise ConfigurationError(
                f"--tokenizer {given}: its fingerprint {found.fingerprint[:12]} is not that of the checkpoint, "
                f"{fingerprint[:12]}: give the one that the data was prepared with"
            )
        return found
    if not fingerprint:
        return None  # imported without one
    run = run_folder(checkpoint)
    folders = [run] if run else []
    if config.data.corpus:
        settings = embedded_settings(config.data.corpus, config.data.cache, vocab_size=config.tokenizer.vocab_size)
        folders.append(Path(settings.output))
    folders += [Path(one) for one in config.data.paths]
    for folder in folders:
        file = folder / "tokenizer.model"
        if file.exists() and (found := Tokenizer(file)).fingerprint == fingerprint:
            return found
    raise ConfigurationError(
        f"{checkpoint}: the tokenizer {fingerprint[:12]} of the run was found in none of "
        f"{', '.join(str(one) for one in folders) or 'its folders'}: give its .model file with --tokenizer, or "
        "--tokenizer none to export without one"
    )


def plan_shards(tensors: list[Exported], limit: int, width: int) -> list[list[Exported]]:
    """Cut a list of tensors into files of at most `limit` bytes, in order; a tensor that is larger has one alone."""
    shards: list[list[Exported]] = [[]]
    size = 0
    for tensor in tensors:
        count = width * int(torch.Size(tensor.shape).numel())
        if shards[-1] and size + count > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += count
    return shards


def write_weights(
    folder: Path, reader: CheckpointReader, config: Config, target: Format, options: ExportOptions, quiet: bool = False
) -> int:
    """Write the model's safetensors files, one tensor in memory at a time; returns their size in bytes."""
    model, width = config.model, DTYPES[options.dtype][1]

    def read(name: str, rows: int | None) -> Tensor:
        if rows is None:
            return reader.read("weight", name)
        return reader.read("weight", name, (0, 0), (rows, model.hidden_size))

    shards = plan_shards(exported_tensors(model, target), options.max_shard_bytes, width)
    total = sum(width * int(torch.Size(tensor.shape).numel()) for shard in shards for tensor in shard)
    places: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=quiet) as progress:
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            writer = ShardWriter(folder / file, [(tensor.name, tensor.shape) for tensor in shard], options.dtype)
            try:
                for tensor in shard:
                    writer.write(tensor.name, export_tensor(tensor, model, target, read))
                    places[tensor.name] = file
                    reader.close_files()
                    progress.update(width * int(torch.Size(tensor.shape).numel()))
                writer.close()
            except OSError as error:
                writer.abandon()
                raise MegagammaError(f"{folder}: cannot be written ({error.strerror}): {advice(error)}") from error
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return total


def origin_of(reader: CheckpointReader, config: Config) -> dict[str, Any]:
    """Where an exported model comes from; kept in its config.json, and told by its card."""
    return {
        "name": config.run.name,
        "step": reader.manifest["step"],
        "tokens": reader.manifest["consumed_samples"] * config.data.sequence_length,
        "gamma": config.init.gamma,
        "init": asdict(config.init),
        "seed": config.run.seed,
        "parameters": parameter_counts(config.model).total,
        "weights": weights_identity(reader),
    }


def export_identity(reader: CheckpointReader, values: dict[str, Any], tokenizer: Tokenizer | None) -> str:
    """A name for an exported model: its weights, its config.json `values` without their origin, its tokenizer."""
    described = {key: value for key, value in values.items() if key != "megagamma"}
    parts = [
        weights_identity(reader),
        json.dumps(described, sort_keys=True),
        tokenizer.fingerprint if tokenizer else "",
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def is_proven(folder: Path, identity: str, tensors: list[Exported], options: ExportOptions) -> bool:
    """Whether a folder is this exported model, whole, with a parity at least as strict as asked."""
    if not is_export(folder):
        return False
    try:
        found, proof = exported_origin(folder), read_json(folder / "parity.json")
        names = HuggingFaceWeights(folder).names()  # opens every file, which notices one that is cut off
    except MegagammaError:
        return False
    whole = names == {tensor.name for tensor in tensors}
    strict = proof.get("holds") is True and proof.get("tolerance", 1.0) <= options.tolerance
    enough = options.parity != "full" or proof.get("compared") == "whole model"
    return whole and strict and enough and found.get("identity") == identity


def exported_origin(folder: Path) -> dict[str, Any]:
    """What `origin_of` gave, of an exported folder, with its eos_token_id; empty for a folder of another maker.

    Raises:
        ConfigurationError: there is no config.json, or it cannot be read.
    """
    values = read_json(folder / "config.json")
    origin = values.get("megagamma")
    return {**origin, "eos_token_id": values.get("eos_token_id")} if isinstance(origin, dict) else {}


def folder_identity(folder: Path) -> str:
    """A name for any Hugging Face folder: of ours what the export noted, else from its config and weight files."""
    known = exported_origin(folder).get("identity")
    if known:
        return str(known)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        state = file.stat()
        with open(file, "rb") as opened:
            digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode() + opened.read(1 << 20))
    return digest.hexdigest()[:32]


def _layers_to_compare(config: Config, options: ExportOptions, say: Callable[[str], None]) -> list[int] | None:
    """None for the whole model."""
    if options.parity == "full":
        return None
    needed = needed_bytes(parameter_counts(config.model).total)
    memory = free_memory(options.device)
    if options.parity == "auto" and needed <= memory:
        return None
    layers = sampled_layers(config.model.num_layers)
    if options.parity == "auto":
        say(
            f"a comparison of whole models needs {needed / 2**30:.1f} GiB and {memory / 2**30:.1f} are free: comparing "
            f"layers {', '.join(map(str, layers))}, each alone"
        )
    return layers


def export(
    checkpoint: Path,
    output: Path,
    options: ExportOptions,
    *,
    native: Callable[[Question], Answer] = outputs_apart,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> Path:
    """Export a checkpoint to a Hugging Face folder and prove that it is the same model.

    The folder appears under its name when it is complete and its parity holds; until then it is hidden.

    Args:
        checkpoint: folder of a checkpoint.
        output: folder to write.
        native: gives our model's answer.
        quiet: no progress bar.

    Raises:
        MegagammaError: the checkpoint, the tokenizer or the disk is at fault; ParityError: the exported model differs.
            Nothing is left then but what was there before.
    """
    reader, config = read_checkpoint(checkpoint)
    target = choose_format(config.model, options.hf_class, options.custom_code)
    tokenizer = find_tokenizer(checkpoint, config, reader.manifest["tokenizer"], options.tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > (config.model.vocab_size or 0):
        raise ConfigurationError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} pieces, more than model.vocab_size={config.model.vocab_size}: "
            "give the tokenizer that the model was trained with, or --tokenizer none"
        )
    special, origin = special_ids(tokenizer), origin_of(reader, config)
    values = export_config(config, target, options.dtype, special, origin)
    origin["identity"] = export_identity(reader, values, tokenizer)
    if is_proven(output, origin["identity"], exported_tensors(config.model, target), options):
        say(f"{output}: is this model already")
        return output
    same = is_export(output) and exported_origin(output).get("identity") == origin["identity"]
    check_destination(output, checkpoint, options.overwrite or same)
    verify_weights(reader)
    if tokenizer is None and options.tokenizer is None:
        say("NOTE: this model came without a tokenizer: none is written; give one with --tokenizer")
    with publishing(output) as partial:
        write_weights(partial, reader, config, target, options, quiet)
        write_json(partial / "config.json", values)
        write_json(
            partial / "generation_config.json", {**special, "do_sample": False, "use_cache": values["use_cache"]}
        )
        if target.code:
            copy_file(Path(__file__).with_name(target.code), partial / target.code)
            say(
                f"NOTE: no stock Hugging Face class holds this model; {target.code} goes with it, and whoever loads it must "
                "trust it (trust_remote_code=True)"
            )
        proven = 0
        if tokenizer is not None:
            proven = export_tokenizer(tokenizer, partial, config.data.sequence_length, [])
        layers = _layers_to_compare(config, options, say)
        found = compare(
            config, checkpoint, partial, target, options.dtype,
            native=native, layers=layers, tolerance=options.tolerance, device=options.device,
        )  # fmt: skip
        say(found.line())
        write_json(partial / "parity.json", found.as_json())
        if not found.holds:
            raise ParityError(
                f"{checkpoint}: the exported model is not the model ({found.line()}): nothing was published"
            )
        write_text(partial / "README.md", model_card(config, origin, target, found, proven, run_folder(checkpoint)))
    return output
