"""A checkpoint of ours -> a folder that transformers loads, written matrix by matrix and published only when proven equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megagamma.checkpoint.manifest import check_complete, stored_config
from megagamma.checkpoint.reader import CheckpointReader, verify
from megagamma.checkpoint.safetensors_writer import DTYPES, ShardWriter
from megagamma.config.resolve import resolve
from megagamma.config.schema import Config
from megagamma.data.preparation.prepare import embedded_settings
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.files import advice, copy_file, write_json, write_text
from megagamma.folders import atomic_directory, recover_at_start
from megagamma.huggingface.card import model_card
from megagamma.huggingface.contents import PARITY, file_hashes, is_export
from megagamma.huggingface.formats import (
    Exported,
    Format,
    choose_format,
    export_config,
    export_tensor,
    exported_tensors,
)
from megagamma.huggingface.importing import INDEX
from megagamma.huggingface.native import ParityInputs, ParityOutputs, run_in_subprocess
from megagamma.huggingface.parity import TOLERANCE, ParityError, compare, free_memory, needed_bytes, sampled_layers
from megagamma.huggingface.provenance import (
    CARRIED,
    check_destination,
    checkpoint_provenance,
    export_hash,
    exported_provenance,
    is_proven,
)
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
        CheckpointError: it is missing, unfinished, or its tensors are not those of the model in its config.
    """
    reader = CheckpointReader(folder)
    check_complete(folder, reader.manifest)
    return reader, resolve(stored_config(folder, reader.manifest))


def verify_weights(reader: CheckpointReader) -> None:
    """Check that the files of weights are what was written, and of the shapes of the model.

    Raises:
        CheckpointError: naming the first that is missing, cut off or altered.
    """
    weights = [entry for entry in reader.manifest["files"] if entry["kind"] == "weight"]
    shapes = check_complete(reader.folder, reader.manifest)
    verify(reader.folder, {**reader.manifest, "files": weights}, shapes=shapes)


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
        tokenizer = Tokenizer(given)
        if fingerprint and tokenizer.fingerprint != fingerprint:
            raise ConfigurationError(
                f"--tokenizer {given}: its fingerprint {tokenizer.fingerprint[:12]} is not that of the checkpoint, "
                f"{fingerprint[:12]}: give the one that the data was prepared with"
            )
        return tokenizer
    if not fingerprint or config.data.toy:
        return None  # imported without one, or a task without text
    run = run_folder(checkpoint)
    folders = [run] if run else []
    if config.data.corpus:
        settings = embedded_settings(config.data.corpus, config.data.cache, vocab_size=config.tokenizer.vocab_size)
        folders.append(Path(settings.output))
    folders += [Path(path) for path in config.data.paths]
    for folder in folders:
        file = folder / "tokenizer.model"
        if file.exists() and (tokenizer := Tokenizer(file)).fingerprint == fingerprint:
            return tokenizer
    raise ConfigurationError(
        f"{checkpoint}: the tokenizer {fingerprint[:12]} of the run was found in none of "
        f"{', '.join(map(str, folders)) or 'its folders'}: give its .model file with --tokenizer, or "
        "--tokenizer none to export without one"
    )


def plan_shards(tensors: list[Exported], limit: int, width: int) -> list[list[Exported]]:
    """Cut a list of tensors into files of at most `limit` bytes, in order; a larger tensor has a file of its own.

    huggingface_hub's planner is not used: it moves a larger tensor before the file that is open, so that the files of
    one model would no longer hold its tensors in the model's order, and would change their numbers.
    """
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
) -> dict[str, str]:
    """Write the model's safetensors files, one tensor in memory at a time; returns each one's name and xxh3-128."""
    model, width = config.model, DTYPES[options.dtype][1]

    def read(name: str, rows: int | None) -> Tensor:
        if rows is None:
            return reader.read("weight", name)
        return reader.read("weight", name, (0, 0), (rows, model.hidden_size))

    shards = plan_shards(exported_tensors(model, target), options.max_shard_bytes, width)
    total = sum(width * int(torch.Size(tensor.shape).numel()) for shard in shards for tensor in shard)
    places: dict[str, str] = {}
    digests: dict[str, str] = {}
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
                _, digests[file] = writer.close()
            except OSError as error:
                writer.abandon()
                raise MegagammaError(f"{folder}: cannot be written ({error.strerror}): {advice(error)}") from error
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return digests


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
    native: Callable[[ParityInputs], ParityOutputs] = run_in_subprocess,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> Path:
    """Export a checkpoint to a Hugging Face folder and prove that it is the same model.

    The folder appears under its name when it is complete and its parity holds; until then it is hidden.

    Args:
        checkpoint: folder of a checkpoint.
        output: folder to write.
        native: runs our model.
        quiet: no progress bar.

    Raises:
        MegagammaError: the checkpoint, the tokenizer or the disk is at fault; ParityError: the exported model differs.
            Nothing is left then but what was there before.
    """
    recover_at_start(output)
    reader, config = read_checkpoint(checkpoint)
    target = choose_format(config.model, options.hf_class, options.custom_code)
    tokenizer = find_tokenizer(checkpoint, config, reader.manifest["tokenizer"], options.tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > (config.model.vocab_size or 0):
        raise ConfigurationError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} pieces, more than model.vocab_size={config.model.vocab_size}: "
            "give the tokenizer that the model was trained with, or --tokenizer none"
        )
    special, provenance = special_ids(tokenizer), checkpoint_provenance(reader, config)
    values = export_config(config, target, options.dtype, special, provenance)
    provenance["identity"] = content_hash = export_hash(reader, values, tokenizer)
    tensors, whole_model = exported_tensors(config.model, target), options.parity == "full"
    if is_proven(output, content_hash, tensors, tolerance=options.tolerance, whole_model=whole_model):
        say(f"{output}: is this model already")
        return output
    same = is_export(output) and exported_provenance(output).get("identity") == content_hash
    check_destination(output, checkpoint, options.overwrite or same)
    verify_weights(reader)
    if tokenizer is None and options.tokenizer is None:
        say("NOTE: this model came without a tokenizer: none is written; give one with --tokenizer")
    with atomic_directory(output, may_replace=is_export, carried=CARRIED) as partial:
        digests = write_weights(partial, reader, config, target, options, quiet)
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
        parity = compare(
            config, checkpoint, partial, target, options.dtype,
            native=native, layers=layers, tolerance=options.tolerance, device=options.device,
        )  # fmt: skip
        say(parity.line())
        write_json(partial / PARITY, parity.as_json() | {"files": file_hashes(partial, digests)})
        if not parity.holds:
            raise ParityError(
                f"{checkpoint}: the exported model is not the model ({parity.line()}): nothing was published"
            )
        write_text(
            partial / "README.md", model_card(config, provenance, target, parity, proven, run_folder(checkpoint))
        )
    return output
