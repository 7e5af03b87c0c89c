"""Reading checkpoints by logical name (`megagamma.checkpoint.saver` describes the format). No model is needed for it.

Tools that look at a checkpoint import this file alone, which brings in neither Megatron nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagamma.checkpoint.safetensors_writer import checksum
from megagamma.config.io import from_dict
from megagamma.errors import CheckpointError, ConfigurationError
from megagamma.reading import Unreadable, read_json_value

# Readers of checkpoints take these from here too.
from megagamma.runs.folder import folder_name as folder_name
from megagamma.runs.folder import steps_saved as steps_saved

FORMAT_VERSION = 2
# What a resume needs of checkpoint.json.
_KEYS = ("step", "adam_step", "config", "consumed_samples", "seconds", "tokenizer", "progress", "files")


def tensor_key(kind: str, name: str) -> str:
    """Name of a tensor inside its file; unique in a checkpoint, so that readers of whole folders can take it.

    Weights have their logical names; moments have their kind before it.
    """
    return name if kind == "weight" else f"{kind}.{name}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a checkpoint.

    Raises:
        CheckpointError: there is none, it is corrupt, or of a newer format.
    """
    path = folder / "checkpoint.json"
    try:
        manifest = read_json_value(path, finite=False)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: not a checkpoint, or not a finished one: checkpoint.json is missing"
        ) from None
    except (Unreadable, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): {remedy(folder)}") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version} is not {FORMAT_VERSION}: {remedy(folder)}")
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} is missing: {remedy(folder)}")
    if not isinstance(manifest["config"], dict) or not isinstance(manifest["files"], list):
        raise CheckpointError(f"{path}: config or files is not what was written: {remedy(folder)}")
    try:
        from_dict(manifest["config"])
    except ConfigurationError as error:
        raise CheckpointError(f"{path}: its config: {error}; or {remedy(folder)}") from error
    found: dict[str, Any] = manifest
    return found


def remedy(folder: Path) -> str:
    """What a user can do about a checkpoint that is corrupt."""
    return f"copy it again, or delete {folder.name} to resume from the checkpoint before it"


def verify(folder: Path, manifest: dict[str, Any], full: bool = True, share: tuple[int, int] = (0, 1)) -> None:
    """Check the files of a checkpoint against its manifest.

    Args:
        folder: the checkpoint.
        manifest: from `read_manifest`.
        full: checksums too, not only sizes.
        share: (k, n) checks only every n-th file from the k-th, so that ranks can share the work.

    Raises:
        CheckpointError: naming the first file that is missing, cut off, or altered.
    """
    for entry in manifest["files"][share[0] :: share[1]]:
        path = folder / entry["file"]
        if not path.exists():
            raise CheckpointError(f"{path}: missing: {remedy(folder)}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, where {entry['bytes']} were written: {remedy(folder)}")
        if full and checksum(path) != entry["xxh3_128"]:
            raise CheckpointError(f"{path}: its content is not what was written (checksum): {remedy(folder)}")


class CheckpointReader:
    """Reads any slice of any logical tensor of a checkpoint; needs no model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._where = {
            (entry["kind"], name): entry["file"] for entry in self.manifest["files"] for name in entry["tensors"]
        }
        self._open: dict[str, Any] = {}

    @property
    def kinds(self) -> set[str]:
        """Kinds of tensors in it; an imported model has no moments."""
        return {kind for kind, _ in self._where}

    def names(self) -> list[str]:
        """Logical names of the weights."""
        return [name for kind, name in self._where if kind == "weight"]

    def read(
        self, kind: str, name: str, start: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """A logical tensor, or the rectangle of it at `start` with `shape`. fp32, on the CPU, mapped from the file.

        Raises:
            CheckpointError: it is not there, or its file cannot be read.
        """
        file = self._where.get((kind, name))
        if file is None:
            raise CheckpointError(f"{self.folder}: has no {kind} of {name}: it is of another model")
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.folder / file}: cannot be read ({error}): {remedy(self.folder)}"
                ) from error
        if start is None or shape is None:
            whole: Tensor = self._open[file].get_tensor(tensor_key(kind, name))
            return whole
        found = self._open[file].get_slice(tensor_key(kind, name))
        if any(s + n > size for s, n, size in zip(start, shape, found.get_shape(), strict=True)):
            raise CheckpointError(f"{self.folder}: {name} has shape {found.get_shape()}: it is of another model")
        rectangle: Tensor = found[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]
        return rectangle

    def close_files(self) -> None:
        """Unmap the files; they are opened again when needed. What was read of them no longer counts as memory here."""
        self._open.clear()

    def tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Every logical tensor of a kind, one at a time."""
        for found, name in self._where:
            if found == kind:
                yield name, self.read(kind, name)
