"""Reading checkpoints by logical name (`megagamma.checkpoint.saver` describes the format). No model is needed for it.

Tools that look at a checkpoint import this file alone, which brings in neither Megatron nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

# Readers of checkpoints take these from here too.
from megagamma.checkpoint.manifest import FORMAT_VERSION as FORMAT_VERSION
from megagamma.checkpoint.manifest import MANIFEST, check_complete, remedy
from megagamma.checkpoint.manifest import read_manifest as read_manifest
from megagamma.checkpoint.safetensors_writer import checksum
from megagamma.errors import CheckpointError
from megagamma.runs.folder import folder_name as folder_name
from megagamma.runs.folder import steps_saved as steps_saved


def tensor_key(kind: str, name: str) -> str:
    """Name of a tensor inside its file; unique in a checkpoint, so that readers of whole folders can take it.

    Weights have their logical names; moments have their kind before it.
    """
    return name if kind == "weight" else f"{kind}.{name}"


def _check_header(path: Path, entry: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None) -> None:
    """Compare the tensors that a file says it holds with those that the manifest lists, and their shapes."""
    expected = {tensor_key(entry["kind"], name): name for name in entry["tensors"]}
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(expected):
                raise CheckpointError(f"{path}: holds other tensors than {MANIFEST} lists: {remedy(path.parent)}")
            for key, name in expected.items():
                tensor = file.get_slice(key)
                found = tuple(tensor.get_shape())
                if tensor.get_dtype() != "F32" or (shapes is not None and found != shapes[name]):
                    raise CheckpointError(
                        f"{path}: {key} is {tensor.get_dtype()} {list(found)}, where the config of {MANIFEST} asks for F32 "
                        f"{list(shapes[name]) if shapes else ''}: {remedy(path.parent)}"
                    )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): {remedy(path.parent)}") from error


def verify(
    folder: Path,
    manifest: dict[str, Any],
    full: bool = True,
    share: tuple[int, int] = (0, 1),
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> None:
    """Check the files of a checkpoint against its manifest: sizes, the tensors that they hold, and checksums.

    A file may be a link to one elsewhere: its content is what counts.

    Args:
        folder: the checkpoint.
        manifest: from `read_manifest`.
        full: checksums too, which reads every byte.
        share: (k, n) checks only every n-th file from the k-th, so that ranks can share the work.
        shapes: of the logical tensors, from `check_complete`; None: any.

    Raises:
        CheckpointError: naming the first file that is missing, cut off, or altered.
    """
    for entry in manifest["files"][share[0] :: share[1]]:
        path = folder / entry["file"]
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: missing: {remedy(folder)}")
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{path}: {size} bytes, where {entry['bytes']} were written: {remedy(folder)}")
            if full and checksum(path) != entry["xxh3_128"]:
                raise CheckpointError(f"{path}: its content is not what was written (checksum): {remedy(folder)}")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}): {remedy(folder)}") from error
        _check_header(path, entry, shapes)


def verify_all(folder: Path, manifest: dict[str, Any], full: bool = True, share: tuple[int, int] = (0, 1)) -> None:
    """`verify`, and that the tensors are exactly those of the model in the manifest's config, with their shapes.

    Raises:
        CheckpointError: naming what is missing or altered.
    """
    verify(folder, manifest, full, share, check_complete(folder, manifest))


class CheckpointReader:
    """Reads any slice of any logical tensor of a checkpoint; needs no model."""

    def __init__(self, folder: Path, manifest: dict[str, Any] | None = None) -> None:
        """Args: manifest: the folder's, when it is read already.

        Raises:
            CheckpointError: the manifest is missing or corrupt.
        """
        self.folder, self.manifest = folder, manifest or read_manifest(folder)
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
        self,
        kind: str,
        name: str,
        start: tuple[int, ...] | None = None,
        shape: tuple[int, ...] | None = None,
        whole: tuple[int, ...] | None = None,
    ) -> Tensor:
        """A logical tensor, or the rectangle of it at `start` with `shape`. fp32, on the CPU, mapped from the file.

        Args:
            whole: shape that the logical tensor must have; None: any that holds the rectangle.

        Raises:
            CheckpointError: it is not there, has another shape, or its file cannot be read.
        """
        file = self._where.get((kind, name))
        if file is None:
            raise CheckpointError(f"{self.folder}: has no {kind} of {name}: it is of another model")
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            found = self._open[file].get_slice(tensor_key(kind, name))
            size = tuple(found.get_shape())
            if whole is not None and size != tuple(whole):
                raise CheckpointError(
                    f"{self.folder}: {kind} of {name} has shape {list(size)}, the model needs {list(whole)}: it is of another "
                    "model"
                )
            if start is None or shape is None:
                tensor: Tensor = self._open[file].get_tensor(tensor_key(kind, name))
                return tensor
            if len(size) != len(start) or any(s + n > most for s, n, most in zip(start, shape, size, strict=True)):
                raise CheckpointError(f"{self.folder}: {name} has shape {list(size)}: it is of another model")
            rectangle: Tensor = found[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]
            return rectangle
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot be read ({error}): {remedy(self.folder)}") from error

    def close_files(self) -> None:
        """Unmap the files; they are opened again when needed. What was read of them no longer counts as memory here."""
        self._open.clear()

    def tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Every logical tensor of a kind, one at a time."""
        for found, name in self._where:
            if found == kind:
                yield name, self.read(kind, name)
