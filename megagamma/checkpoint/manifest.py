"""checkpoint.json: what it must hold, its own checksum, and what its config says about the tensors.

The checksum guards against accidents and not against intent: whoever can write the file can write its checksum.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import xxhash

from megagamma.config.io import current_form, from_dict
from megagamma.config.schema import Config, resolve_model
from megagamma.errors import CheckpointError, MegagammaError
from megagamma.model.parameters import KINDS, layer_parameters, logical_parameters, outer_parameters
from megagamma.reading import Unreadable, read_json_value
from megagamma.runs.folder import folder_name, is_step_name

FORMAT_VERSION = 2
MANIFEST = "checkpoint.json"
# What a resume needs of it.
_KEYS = ("step", "adam_step", "config", "consumed_samples", "seconds", "tokenizer", "progress", "files")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_LARGEST_STEP = 99_999_999  # of the name of a folder
_LARGEST_COUNT = 2**63 - 1
_LARGEST_FILE = 1 << 28  # bytes of checkpoint.json; that of 1,000 layers has 4 MB
# What reading a config that somebody altered can raise.
_ODD_VALUES = (
    TypeError, ValueError, KeyError, AttributeError, AssertionError, ArithmeticError, RecursionError, MegagammaError,
)  # fmt: skip


def remedy(folder: Path) -> str:
    """What a user can do about a checkpoint that is corrupt."""
    return f"copy it again, or delete {folder.name} to resume from the checkpoint before it"


def _digest(manifest: dict[str, Any]) -> str:
    """Checksum of all of a manifest but its checksum, whatever the order and spacing of its file."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return xxhash.xxh3_128(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its checksum, and with what it says about moments."""
    plain = json.loads(json.dumps(manifest))
    plain["moments"] = {entry["kind"] for entry in plain["files"]} == set(KINDS)
    return {**plain, "checksum": _digest(plain)}


def is_sealed(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has a checksum; those of version 0.1 had none."""
    return "checksum" in manifest


def _shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _is_count(value: Any, most: int = _LARGEST_COUNT) -> bool:
    return type(value) is int and 0 <= value <= most


def _problem_of_entry(entry: Any) -> str | None:
    """What is wrong with an entry of `files`, if anything."""
    if not isinstance(entry, dict):
        return "is not an object"
    name, names = entry.get("file"), entry.get("tensors")
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        return f"file={_shown(name)} must be the plain name of a .safetensors file in the folder"
    if entry.get("kind") not in KINDS:
        return f"kind={_shown(entry.get('kind'))} must be {', '.join(KINDS)}"
    if not _is_count(entry.get("bytes")):
        return f"bytes={_shown(entry.get('bytes'))} must be a whole number, 0 or more"
    digest = entry.get("xxh3_128")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        return f"xxh3_128={_shown(digest)} must be 32 hexadecimal digits"
    if not isinstance(names, list) or not names or not all(isinstance(one, str) and one for one in names):
        return "tensors must be a list of names that is not empty"
    return None


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the values of a manifest, if anything."""
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        return f"{', '.join(missing)} is missing"
    for key, most in (
        ("step", _LARGEST_STEP), ("adam_step", _LARGEST_STEP), ("consumed_samples", _LARGEST_COUNT),
    ):  # fmt: skip
        if not _is_count(manifest[key], most):
            return f"{key}={_shown(manifest[key])} must be a whole number from 0 to {most}"
    step, seconds = manifest["step"], manifest["seconds"]
    if manifest["adam_step"] > step:
        return f"adam_step={manifest['adam_step']} must be at most step={step}"
    if manifest["consumed_samples"] < step:
        return f"consumed_samples={manifest['consumed_samples']} must be at least step={step}: a step takes a sample or more"
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        return f"seconds={_shown(seconds)} must be a number, 0 or more"
    if not isinstance(manifest["tokenizer"], str):
        return f"tokenizer={_shown(manifest['tokenizer'])} must be a text"
    for key in ("progress", "config"):
        if not isinstance(manifest[key], dict):
            return f"{key}={_shown(manifest[key])} must be an object"
    files = manifest["files"]
    if not isinstance(files, list) or not files:
        return f"files={_shown(files)} must be a list that is not empty"
    for index, entry in enumerate(files):
        if (problem := _problem_of_entry(entry)) is not None:
            return f"files[{index}]: {problem}"
    names = [entry["file"] for entry in files]
    tensors = [(entry["kind"], name) for entry in files for name in entry["tensors"]]
    if len(set(names)) < len(names) or len(set(tensors)) < len(tensors):
        return "files: a file or a tensor is listed twice"
    return _problem_of_moments(manifest)


def _problem_of_moments(manifest: dict[str, Any]) -> str | None:
    kinds = {entry["kind"] for entry in manifest["files"]}
    if is_sealed(manifest) and "moments" not in manifest:
        return "moments is missing"
    moments = manifest.get("moments", kinds == set(KINDS))
    if type(moments) is not bool:
        return f"moments={_shown(moments)} must be true or false"
    if kinds != (set(KINDS) if moments else {"weight"}):
        return f"files: hold {', '.join(sorted(kinds))}, and moments={str(moments).lower()}: some are missing"
    if not moments and manifest["adam_step"]:
        return f"files: Adam's moments are missing, and adam_step={manifest['adam_step']} says that there were some"
    return None


def _problem_of_config(config: dict[str, Any]) -> str | None:
    for name, section in config.items():
        if name != "deepspeed_config" and not isinstance(section, dict):
            return f"config: {_shown(name)} must be a section of options, not {_shown(section)}"
    length = config.get("data", {}).get("sequence_length")
    if not _is_count(length) or length == 0:
        return f"config: data.sequence_length={_shown(length)} must be a whole number above 0"
    try:
        current_form(config)
    except _ODD_VALUES as error:
        return f"config: {str(error)!a}"
    return None


def _read(folder: Path) -> Any:
    path = folder / MANIFEST
    try:
        return read_json_value(path, finite=False, limit=_LARGEST_FILE)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a checkpoint, or not a finished one: {MANIFEST} is missing") from None
    except (Unreadable, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): {remedy(folder)}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a checkpoint: its checksum, the type and range of every value, and the folder's name checked.

    Raises:
        CheckpointError: there is none, it is corrupt, of another format, or of another step than the folder's name says.
    """
    path = folder / MANIFEST
    manifest = _read(folder)
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {_shown(version)} is not {FORMAT_VERSION}: {remedy(folder)}")
    try:
        if is_sealed(manifest) and manifest["checksum"] != _digest(manifest):
            raise CheckpointError(f"{path}: its content is not what was written (checksum): {remedy(folder)}")
        problem = _problem(manifest) or _problem_of_config(manifest["config"])
    except RecursionError:
        problem = "its values are nested too deeply"
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}: {remedy(folder)}")
    # A link's name says nothing: the folder that it leads to has the name that was given when it was written.
    name, step = folder.resolve().name, manifest["step"]
    if is_step_name(name) and name != folder_name(step):
        raise CheckpointError(
            f"{path}: holds step {step}, and its folder is named {name}: give the folder the name {folder_name(step)}"
        )
    found: dict[str, Any] = manifest
    return found


def stored_config(folder: Path, manifest: dict[str, Any]) -> Config:
    """The config in a manifest, its model resolved.

    Raises:
        CheckpointError: it has unknown options or values that make no sense.
    """
    try:
        config = from_dict(manifest["config"])
        resolve_model(config.model)
        return config
    except _ODD_VALUES as error:
        raise CheckpointError(
            f"{folder / MANIFEST}: its config cannot be used ({ascii(str(error))[1:-1]}): it was written by another version of "
            "this program, or altered"
        ) from error


def expected_shapes(folder: Path, manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every logical tensor of the model that a manifest's config describes.

    Raises:
        CheckpointError: the config describes no model, or one with another number of tensors than are listed.
    """
    path, model = folder / MANIFEST, stored_config(folder, manifest).model
    listed = sum(len(entry["tensors"]) for entry in manifest["files"] if entry["kind"] == "weight")
    try:
        if model.vocab_size is None:
            raise CheckpointError(
                f"{path}: its config names no model.vocab_size: the checkpoint was not written by a run"
            )
        # Counted before they are listed: a config can ask for 10^8 layers.
        count = len(layer_parameters(model, 0)) * model.num_layers + len(outer_parameters(model))
        if count != listed:
            raise CheckpointError(
                f"{path}: {listed} weights are listed, where its config describes a model of {count}: {remedy(folder)}"
            )
        return {parameter.name: parameter.shape for parameter in logical_parameters(model)}
    except CheckpointError:
        raise
    except _ODD_VALUES as error:
        raise CheckpointError(
            f"{path}: its config describes no model ({ascii(str(error))[1:-1]}): {remedy(folder)}"
        ) from error


def check_complete(folder: Path, manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Check that a manifest lists exactly the tensors of the model in its config, for every kind.

    Raises:
        CheckpointError: naming the first that is missing or unknown.

    Returns:
        Shape by logical name.
    """
    shapes = expected_shapes(folder, manifest)
    for kind in {entry["kind"] for entry in manifest["files"]}:
        listed = {name for entry in manifest["files"] if entry["kind"] == kind for name in entry["tensors"]}
        different = sorted(listed ^ set(shapes))
        if different:
            what = "is missing" if different[0] in shapes else "is not of the model in its config"
            raise CheckpointError(
                f"{folder / MANIFEST}: {kind} of {_shown(different[0])} {what} ({len(different)} such): {remedy(folder)}"
            )
    return shapes
