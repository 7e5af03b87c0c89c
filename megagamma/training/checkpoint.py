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

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megagamma.distributed.engine import Engine
from megagamma.distributed.runtime import Runtime
from megagamma.distributed.state import KINDS
from megagamma.errors import CheckpointError
from megagamma.files import advice, sync_folder, write_json
from megagamma.model.parameters import LogicalParameter, MappedTensor, Part
from megagamma.training.reading import FORMAT_VERSION, CheckpointReader, folder_name, steps_saved, verify
from megagamma.training.shards import ShardWriter


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
