"""Checkpoints by logical name: fp32 weights and Adam moments that load on any layout.

A checkpoint is a folder `checkpoints/step_00001000/` with files `weight-*.safetensors`, `exp_avg-*.safetensors` and
`exp_avg_sq-*.safetensors`, whose tensors have their logical names and shapes (`megagamma.model.parameters`) whatever
the layout that wrote them, and `checkpoint.json`: step, samples, config, and every file's tensors, size and
checksum. There is no pickle in it. Files are written in a hidden folder and renamed when all are complete, so a
folder under its final name is whole.

Every rank writes a share of the logical tensors. To do so it gathers one tensor at a time, over the data-parallel
ranks that ZeRO has spread it over and the tensor-parallel ranks that it is split over.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor

from megagamma.distributed.engine import Engine
from megagamma.distributed.runtime import Runtime
from megagamma.distributed.state import KINDS
from megagamma.errors import CheckpointError
from megagamma.files import advice, sync_folder, write_json
from megagamma.model.parameters import LogicalParameter, MappedTensor, Part
from megagamma.training.shards import ShardWriter, checksum

FORMAT_VERSION = 1
# What a resume needs of checkpoint.json.
_KEYS = ("step", "adam_step", "config", "consumed_samples", "seconds", "tokenizer", "progress", "files")
_NAME = re.compile(r"step_(\d{8})")


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class _Piece:
    """A logical tensor as one of this rank's tensors holds it, and who writes it."""

    tensor: MappedTensor
    logical: LogicalParameter
    parts: tuple[Part, ...]
    data_owner: int
    tensor_owner: int


def _pieces(engine: Engine) -> list[_Piece]:
    """What this pipeline stage writes, in the same order on all its ranks; owners take turns."""
    runtime = engine.runtime
    found: list[_Piece] = []
    for tensor in engine.map:
        if tensor.is_copy:
            continue
        for name in dict.fromkeys(part.logical.name for part in tensor.parts):
            parts = tuple(part for part in tensor.parts if part.logical.name == name)
            number = len(found)
            split = tensor.is_split and runtime.tensor_size > 1
            found.append(
                _Piece(
                    tensor,
                    parts[0].logical,
                    parts,
                    data_owner=(number // runtime.tensor_size) % runtime.data_size,
                    tensor_owner=number % runtime.tensor_size if split else 0,
                )
            )
    return found


def _assemble(piece: _Piece, local: Tensor, runtime: Runtime) -> Tensor | None:
    """The whole logical tensor on its owner; None on the other tensor-parallel ranks."""
    slab = torch.cat([part.view(local) for part in piece.parts]).contiguous()
    axis = piece.logical.split_axis
    if axis is None or runtime.tensor_size == 1:
        return slab if runtime.tensor_rank == piece.tensor_owner else None
    group = parallel_state.get_tensor_model_parallel_group()
    mine = runtime.tensor_rank == piece.tensor_owner
    slabs = [torch.empty_like(slab) for _ in range(runtime.tensor_size)] if mine else None
    dist.gather(slab, slabs, dst=dist.get_global_rank(group, piece.tensor_owner), group=group)
    return torch.cat(slabs, dim=axis) if slabs is not None else None


def _write_files(engine: Engine, folder: Path) -> list[dict[str, Any]]:
    """Write this rank's share of every kind; returns its entries for the manifest."""
    runtime, pieces, files = engine.runtime, _pieces(engine), []
    for kind in KINDS:
        mine = [p for p in pieces if (p.data_owner, p.tensor_owner) == (runtime.data_rank, runtime.tensor_rank)]
        writer = None
        if mine:
            entries = [(piece.logical.name, piece.logical.shape) for piece in mine]
            writer = ShardWriter(folder / f"{kind}-{runtime.rank:05d}.safetensors", entries)
        try:
            local, current = None, None
            for piece in pieces:
                if piece.tensor is not current:
                    local, current = engine.state.get(piece.tensor, kind), piece.tensor
                if piece.data_owner != runtime.data_rank:
                    continue
                assert local is not None
                whole = _assemble(piece, local, runtime)
                if whole is not None and writer is not None:
                    writer.write(piece.logical.name, whole)
            if writer is not None:
                size, digest = writer.close()
                names = [piece.logical.name for piece in mine]
                files.append(
                    {"file": writer.path.name, "kind": kind, "bytes": size, "xxh3_128": digest, "tensors": names}
                )
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise
    return files


def save(engine: Engine, root: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint; all ranks call it.

    Args:
        engine: the run's.
        root: folder of the run's checkpoints.
        step: optimizer steps done.
        state: what else a resume needs (JSON): config, consumed samples, tokenizer, guard.

    Raises:
        CheckpointError: it could not be written, such as on a full disk. What was there before stays.

    Returns:
        The finished folder.
    """
    runtime = engine.runtime
    final, partial = root / folder_name(step), root / f".{folder_name(step)}.partial"

    def begin() -> None:
        # Left behind by a run that was killed while saving.
        for old in root.glob(".step_*"):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)

    problem: str | None = None
    files: list[dict[str, Any]] = []
    runtime.on_main(lambda: _explained(begin, partial))
    try:
        files = _write_files(engine, partial)
    except OSError as error:
        # On several ranks the others wait in a collective for this one: leave, and the launcher ends them.
        problem = f"{partial.name}: cannot be written ({error.strerror}): {advice(error)}"
        if runtime.size > 1:
            alone = CheckpointError(problem)
            alone.on_one_rank = True
            raise alone from error
    found = runtime.gather((files, problem))
    problems = [one for _, one in found if one]
    if problems:
        runtime.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise CheckpointError(f"checkpoint of step {step} in {root}: {problems[0]}; the ones before are untouched")

    def publish() -> None:
        manifest = {
            "format": "megagamma checkpoint",
            "version": FORMAT_VERSION,
            "step": step,
            "adam_step": engine.state.step,
            **state,
            "files": [entry for files, _ in found for entry in files],
        }
        write_json(partial / "checkpoint.json", manifest)
        sync_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(root)

    runtime.on_main(lambda: _explained(publish, partial))
    return final


def _explained(action: Any, path: Path) -> None:
    try:
        action()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}): {advice(error)}") from error


def steps_saved(root: Path) -> list[int]:
    """Steps of the finished checkpoints of a run, ascending."""
    if not root.is_dir():
        return []
    names = (_NAME.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(int(name.group(1)) for name in names if name)


def prune(root: Path, keep_last: int, permanent: set[int]) -> list[int]:
    """Delete the oldest checkpoints that are neither permanent nor among the newest `keep_last` (0: keep all)."""
    if keep_last == 0:
        return []
    removable = [step for step in steps_saved(root) if step not in permanent][:-keep_last]
    for step in removable:
        doomed = root / f".{folder_name(step)}.deleted"
        (root / folder_name(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removable


def read_manifest(folder: Path) -> dict[str, Any]:
    """checkpoint.json of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or of a newer format.
    """
    path = folder / "checkpoint.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: not a checkpoint, or not a finished one: checkpoint.json is missing"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): {remedy(folder)}") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version} is not {FORMAT_VERSION}: {remedy(folder)}")
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} is missing: {remedy(folder)}")
    found: dict[str, Any] = manifest
    return found


def remedy(folder: Path) -> str:
    """What a user can do about a checkpoint that is damaged."""
    return f"copy it again, or delete {folder.name} to go on from the checkpoint before it"


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

    def names(self) -> list[str]:
        """Logical names of the weights."""
        return [name for kind, name in self._where if kind == "weight"]

    def read(
        self, kind: str, name: str, start: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """A logical tensor, or the rectangle of it at `start` with `shape`. fp32, on the CPU."""
        file = self._where.get((kind, name))
        if file is None:
            raise CheckpointError(f"{self.folder}: has no {kind} of {name}: it is of another model")
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        if start is None or shape is None:
            whole: Tensor = self._open[file].get_tensor(name)
            return whole
        found = self._open[file].get_slice(name)
        if any(s + n > size for s, n, size in zip(start, shape, found.get_shape(), strict=True)):
            raise CheckpointError(f"{self.folder}: {name} has shape {found.get_shape()}: it is of another model")
        rectangle: Tensor = found[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]
        return rectangle

    def tensors(self, kind: str = "weight") -> Iterator[tuple[str, Tensor]]:
        """Every logical tensor of a kind, one at a time."""
        for found, name in self._where:
            if found == kind:
                yield name, self.read(kind, name)


def load(engine: Engine, folder: Path) -> dict[str, Any]:
    """Fill an engine's weights and moments from a checkpoint of any layout; all ranks call it.

    Raises:
        CheckpointError: it is damaged, or of another model. Checked before a weight is touched.

    Returns:
        The manifest.
    """
    runtime, reader = engine.runtime, CheckpointReader(folder)
    problem: str | None = None
    try:
        verify(folder, reader.manifest, share=(runtime.rank, runtime.size))
    except CheckpointError as error:
        problem = str(error)
    problems = [one for one in runtime.gather(problem) if one]
    if problems:
        raise CheckpointError(problems[0])
    for tensor in engine.map:
        for kind in KINDS:
            local = torch.empty(tensor.shape, dtype=torch.float32)
            for part in tensor.parts:
                part.view(local).copy_(reader.read(kind, part.logical.name, part.start, part.shape))
            engine.state.set(tensor, kind, local.to(runtime.device))
    engine.state.step = reader.manifest["adam_step"]
    return reader.manifest
