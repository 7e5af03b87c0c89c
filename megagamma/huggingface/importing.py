"""A Hugging Face folder -> a run's folder with a checkpoint of ours, to continue pretraining or to analyse a public model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from megagamma.checkpoint.manifest import FORMAT_VERSION, MANIFEST, sealed
from megagamma.checkpoint.safetensors_writer import ShardWriter
from megagamma.config.io import as_dict
from megagamma.config.resolve import resolve
from megagamma.config.schema import Config, DataConfig, RunConfig
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError, DataError
from megagamma.files import read_json, write_json
from megagamma.folders import atomic_directory, recover_at_start
from megagamma.huggingface.contents import check_unaltered
from megagamma.huggingface.formats import Format, exported_tensors, import_config, import_tensor
from megagamma.model.parameters import LogicalParameter, logical_parameters
from megagamma.owned import require_place
from megagamma.runs.folder import RunFolder

INDEX = "model.safetensors.index.json"


class HuggingFaceWeights:
    """Reads tensors of a Hugging Face folder by name, mapped from its safetensors files."""

    def __init__(self, folder: Path) -> None:
        """Raises: MegagammaError: there are no safetensors files, or one is corrupt."""
        self.folder = folder
        index = folder / INDEX
        files = ["model.safetensors"]
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict):
                raise ConfigurationError(f"{index}: weight_map is missing: copy the folder again")
            if not all(isinstance(file, str) and file == Path(file).name for file in places.values()):
                raise ConfigurationError(f"{index}: weight_map must give names of files in its folder: copy it again")
            files = sorted(set(places.values()))
        self._files: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(folder / file, framework="pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), folder / file)
            except (SafetensorError, OSError) as error:
                raise ConfigurationError(
                    f"{folder / file}: cannot be read ({error}): give a folder with safetensors weights"
                ) from error

        # Buffers that older Llama folders have, and Lfm3's gate by the name that transformers writes.
        self._files = {name: file for name, file in self._files.items() if not name.endswith("rotary_emb.inv_freq")}
        self._stored: dict[str, str] = {}

    def rename(self, stored: str, name: str) -> None:
        """Give tensors whose names contain `stored` the name that has `name` in its place."""
        for old in [name for name in self._files if stored in name]:
            self._files[old.replace(stored, name)] = self._files.pop(old)
            self._stored[old.replace(stored, name)] = old

    def names(self) -> set[str]:
        """Every tensor."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        with safe_open(self._files[name], framework="pt") as opened:
            return tuple(opened.get_slice(self._stored.get(name, name)).get_shape())

    def read(self, name: str, _rows: int | None = None) -> Tensor:
        """A tensor in its own dtype. Its file is mapped for as long as the tensor lives, and no longer."""
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self._stored.get(name, name))
        return tensor


def _headwise(weights: HuggingFaceWeights, values: dict[str, Any]) -> bool:
    """Whether the gates stored with the queries are one per head: head_dim equal rows each, in every layer."""
    heads = values["num_attention_heads"]
    for layer in range(values["num_hidden_layers"]):
        pair = weights.read(f"model.layers.{layer}.self_attn.q_proj.weight")
        pair = pair.view(heads, 2, -1, pair.shape[-1])[:, 1]
        if pair.shape[1] == 1 or not bool((pair == pair[:, :1]).all()):
            return False
    return True


def _check_layers(weights: HuggingFaceWeights, values: dict[str, Any]) -> None:
    """Refuse a number of layers that the weights do not have, before anything is done for each of them."""
    count = values.get("num_hidden_layers")
    layers = {found[1] for name in weights.names() if (found := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    if isinstance(count, int) and count > len(layers):
        raise ConfigurationError(
            f"{weights.folder}: num_hidden_layers={count}, and its weights have {len(layers)} layers: its config.json and "
            "weights do not belong together"
        )


def _check_tensors(weights: HuggingFaceWeights, config: Config, source: Format) -> None:
    expected = {tensor.name: tensor.shape for tensor in exported_tensors(config.model, source)}
    # A tied head may be written all the same.
    extra = weights.names() - set(expected) - ({"lm_head.weight"} if config.model.tie_embeddings else set())
    missing = set(expected) - weights.names()
    if missing or extra:
        raise ConfigurationError(
            f"{weights.folder}: {len(missing)} tensors are missing and {len(extra)} are unknown "
            f"({', '.join(sorted(missing | extra)[:3])}): its config.json and weights do not belong together"
        )
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            raise ConfigurationError(
                f"{weights.folder}: {name} has shape {weights.shape(name)}, config.json says {shape}"
            )


def _tokenizer(folder: Path, given: str | None) -> Tokenizer | None:
    if given is not None:
        return Tokenizer(given)
    for name in ("sentencepiece.model", "tokenizer.model"):
        if (folder / name).exists():
            try:
                return Tokenizer(folder / name)
            except DataError:
                continue
    return None


def import_model(
    folder: Path, output: Path, *, tokenizer: str | None = None, vocab_size_multiple: int = 128, quiet: bool = False
) -> Path:
    """Write a run's folder whose checkpoint of step 0 has the weights of a Hugging Face model, in fp32.

    Adam starts anew. `pretrain.py --config OUTPUT/config.yaml --data.paths ...` continues from it.

    Args:
        folder: a Hugging Face folder of one of `huggingface.FORMATS`' classes, with safetensors weights.
        output: the run's folder; must not exist.
        tokenizer: a SentencePiece file; None: the folder's.
        vocab_size_multiple: the vocabulary is padded to a multiple, with rows of zeros.

    Raises:
        ConfigurationError: the folder is not such a model, or an exported one that was altered, or the output exists.

    Returns:
        The checkpoint's folder.
    """
    recover_at_start(output)
    if output.exists():
        raise ConfigurationError(f"--out {output} exists already: choose another folder")
    require_place(output, f"--out {output}", itself=(), around=("run",))
    if vocab_size_multiple < 1:
        raise ConfigurationError(f"--vocab_size_multiple {vocab_size_multiple}: must be 1 or more")
    values = read_json(folder / "config.json")
    check_unaltered(folder)
    weights = HuggingFaceWeights(folder)
    if values.get("model_type") == "lfm3":
        weights.rename("self_attn.gate_proj", "self_attn.g_proj")
    _check_layers(weights, values)
    try:
        model, source, context_length = import_config(values, lambda: _headwise(weights, values))
    except KeyError as error:
        raise ConfigurationError(
            f"{folder}: {error} is missing in its config.json or weights: copy it again"
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{folder / 'config.json'}: a value is of the wrong kind ({error}): fix it") from error
    model.vocab_size_multiple = vocab_size_multiple
    config = resolve(
        Config(
            run=RunConfig(name=output.name, folder=str(output)),
            model=model,
            data=DataConfig(sequence_length=context_length),
        )
    )
    _check_tensors(weights, config, source)
    tensors = (
        (parameter, import_tensor(parameter, model, source, weights.read)) for parameter in logical_parameters(model)
    )
    return write_run(output, config, tensors, _tokenizer(folder, tokenizer), {"imported_from": folder.name}, quiet)


def write_run(
    output: Path,
    config: Config,
    tensors: Iterable[tuple[LogicalParameter, Tensor]],
    tokenizer: Tokenizer | None = None,
    extra: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Write a run's folder whose checkpoint of step 0 holds weights and no Adam moments; complete, or not at all.

    Args:
        config: resolved, vocabulary known.
        tensors: every logical parameter in the order of `logical_parameters`, one in memory at a time.
        extra: more for checkpoint.json.

    Raises:
        MegagammaError: it cannot be written.

    Returns:
        The checkpoint's folder.
    """
    parameters = logical_parameters(config.model)
    with atomic_directory(output) as partial:
        run = RunFolder(partial)
        checkpoint = run.checkpoint(0)
        checkpoint.mkdir(parents=True)
        writer = ShardWriter(
            checkpoint / "weight-00000.safetensors", [(parameter.name, parameter.shape) for parameter in parameters]
        )
        for parameter, values in tqdm(tensors, total=len(parameters), unit="tensor", desc="weights", disable=quiet):
            writer.write(parameter.name, values)
        size, digest = writer.close()
        names = [parameter.name for parameter in parameters]
        entry = {"file": writer.path.name, "kind": "weight", "bytes": size, "xxh3_128": digest, "tensors": names}
        manifest = {
            "format": "megagamma checkpoint",
            "version": FORMAT_VERSION,
            "step": 0,
            "adam_step": 0,
            "config": as_dict(config),
            "consumed_samples": 0,
            "seconds": 0.0,
            "tokenizer": tokenizer.fingerprint if tokenizer else "",
            "progress": {},
            **(extra or {}),
            "files": [entry],
        }
        write_json(checkpoint / MANIFEST, sealed(manifest))
        run.write_config(config)
        if tokenizer:
            run.write_tokenizer(tokenizer.path)
    return RunFolder(output).checkpoint(0)
