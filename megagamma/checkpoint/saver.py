"""Checkpoints by logical name: fp32 weights and Adam moments that load on any layout.

A checkpoint is a folder `checkpoints/step_00001000/` with files `weight-*.safetensors`, `exp_avg-*.safetensors` and
`exp_avg_sq-*.safetensors`, whose tensors have their logical names and shapes (`megagamma.model.parameters`) whatever
the layout that wrote them, and `checkpoint.json`: step, samples, config, and every file's tensors, size and
checksum. There is no pickle in it. Files are written in a hidden folder and renamed when all are complete, so a
folder under its final name is whole. `torch.distributed.checkpoint` reads it with its `HuggingFaceStorageReader`; its
writer is not used, since it wants the whole state at once, where here one tensor at a time is gathered.

Every rank writes a share of the logical tensors. To do so it gathers one tensor at a time, over the data-parallel
ranks that ZeRO has partitioned it over and the tensor-parallel ranks that it is split over.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagamma.checkpoint.reader import (
    FORMAT_VERSION,
    CheckpointReader,
    folder_name,
    read_manifest,
    steps_saved,
    tensor_key,
    verify,
)
from megagamma.checkpoint.safetensors_writer import ShardWriter
from megagamma.distributed.engine import Engine
from megagamma.distributed.runtime import Runtime
from megagamma.distributed.state import KINDS
from megagamma.errors import CheckpointError
from megagamma.files import advice, write_json
from megagamma.folders import finish_removal, publish_directory, recover_directory, remove_directory
from megagamma.model.parameters import LogicalParameter, MappedTensor, Part
from megagamma.owned import enumerated, strangers


@dataclass(frozen=True)
class _WorkUnit:
    """A logical tensor as one of this rank's tensors holds it, and who writes it."""

    tensor: MappedTensor
    logical: LogicalParameter
    parts: tuple[Part, ...]
    data_owner: int
    tensor_owner: int


def _work_units(engine: Engine) -> list[_WorkUnit]:
    """What this pipeline stage writes, in the same order on all its ranks; owners take turns."""
    runtime = engine.runtime
    units: list[_WorkUnit] = []
    for tensor in engine.map:
        if tensor.is_copy:
            continue
        for name in dict.fromkeys(part.logical.name for part in tensor.parts):
            parts = tuple(part for part in tensor.parts if part.logical.name == name)
            number = len(units)
            split = tensor.is_split and runtime.tensor_size > 1
            units.append(
                _WorkUnit(
                    tensor,
                    parts[0].logical,
                    parts,
                    data_owner=(number // runtime.tensor_size) % runtime.data_size,
                    tensor_owner=number % runtime.tensor_size if split else 0,
                )
            )
    return units


def _assemble(unit: _WorkUnit, local: Tensor, runtime: Runtime) -> Tensor | None:
    """The whole logical tensor on its owner; None on the other tensor-parallel ranks."""
    shard = torch.cat([part.view(local) for part in unit.parts]).contiguous()
    axis = unit.logical.split_axis
    if axis is None or runtime.tensor_size == 1:
        return shard if runtime.tensor_rank == unit.tensor_owner else None
    group = runtime.tensor_group
    is_owner = runtime.tensor_rank == unit.tensor_owner
    shards = [torch.empty_like(shard) for _ in range(runtime.tensor_size)] if is_owner else None
    dist.gather(shard, shards, dst=dist.get_global_rank(group, unit.tensor_owner), group=group)
    return torch.cat(shards, dim=axis) if shards is not None else None


def _owned(engine: Engine) -> dict[str, list[LogicalParameter]]:
    """What this rank writes, by kind, in the order in which `whole_tensors` gives it."""
    runtime = engine.runtime
    logical = [
        unit.logical
        for unit in _work_units(engine)
        if (unit.data_owner, unit.tensor_owner) == (runtime.data_rank, runtime.tensor_rank)
    ]
    return dict.fromkeys(KINDS, logical) if logical else {}


def whole_tensors(engine: Engine, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, name, whole logical tensor) of what this rank writes, one at a time, as copies.

    A collective: all ranks must run it to its end.
    """
    runtime, units = engine.runtime, _work_units(engine)
    for kind in kinds:
        local, current = None, None
        for unit in units:
            if unit.tensor is not current:
                local, current = engine.state.get(unit.tensor, kind), unit.tensor
            if unit.data_owner != runtime.data_rank:
                continue
            assert local is not None
            whole = _assemble(unit, local, runtime)
            if whole is not None:
                yield kind, unit.logical.name, whole


def _write_files(
    folder: Path, rank: int, owned: dict[str, list[LogicalParameter]], tensors: Iterable[tuple[str, str, Tensor]]
) -> tuple[list[dict[str, Any]], str | None]:
    """Write a rank's tensors; returns its entries for the manifest, and what went wrong.

    After a problem the tensors are still taken to the end, since other ranks may take part in gathering them.
    """
    files: list[dict[str, Any]] = []
    writer: ShardWriter | None = None
    problem: str | None = None
    left = {kind: len(parameters) for kind, parameters in owned.items()}
    for kind, name, tensor in tensors:
        if problem is not None:
            continue
        try:
            if writer is None:
                entries = [(tensor_key(kind, parameter.name), parameter.shape) for parameter in owned[kind]]
                writer = ShardWriter(folder / f"{kind}-{rank:05d}.safetensors", entries)
            writer.write(tensor_key(kind, name), tensor)
            left[kind] -= 1
            if left[kind] == 0:
                size, digest = writer.close()
                names = [parameter.name for parameter in owned[kind]]
                entry = {"file": writer.path.name, "kind": kind, "bytes": size, "xxh3_128": digest, "tensors": names}
                files.append(entry)
                writer = None
        except OSError as error:
            problem = f"cannot be written ({error.strerror}): {advice(error)}"
            if writer is not None:
                writer.abandon()
    return files, problem


class Saver:
    """Writes a run's checkpoints, one at a time: at once, or in a thread while training continues."""

    def __init__(self, engine: Engine, root: Path) -> None:
        """Args: root: folder of the run's checkpoints."""
        self.engine, self.runtime, self.root = engine, engine.runtime, root
        self._thread: threading.Thread | None = None
        self._written: tuple[list[dict[str, Any]], str | None] = ([], None)
        self._manifest: dict[str, Any] = {}
        self._copies: dict[tuple[str, str], Tensor] = {}

    def save(self, step: int, state: dict[str, Any], asynchronous: bool = False) -> Path | None:
        """Write a checkpoint; all ranks call it.

        Args:
            step: optimizer steps done.
            state: what else a resume needs (JSON): config, consumed samples, tokenizer, guard.
            asynchronous: copy the state to memory and return; `poll` or `finish` completes it. Only this rank's share
                is copied.

        Raises:
            CheckpointError: on every rank, when one could not write, such as on a full disk. What was there before
                stays. Of an asynchronous save, `poll` or `finish` raises it.

        Returns:
            The finished folder, or None while it is being written.
        """
        self.finish()
        partial = self.root / f".{folder_name(step)}.partial"
        self._manifest = {
            "format": "megagamma checkpoint",
            "version": FORMAT_VERSION,
            "step": step,
            "adam_step": self.engine.state.step,
            **state,
        }

        def begin() -> None:
            clean_up(self.root)
            partial.mkdir(parents=True)

        self.runtime.run_on_rank0(lambda: _explained(begin, partial))
        owned, tensors = _owned(self.engine), whole_tensors(self.engine)
        if not asynchronous:
            self._written = _write_files(partial, self.runtime.rank, owned, tensors)
            return self._publish()
        copies = [(kind, name, self._copy(kind, name, tensor)) for kind, name, tensor in tensors]

        def write() -> None:
            self._written = _write_files(partial, self.runtime.rank, owned, copies)

        self._thread = threading.Thread(target=write, name=f"save-{step}")
        self._thread.start()
        return None

    def _copy(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """A copy in memory that is kept for the next save: fresh memory costs more time than the copy."""
        known = self._copies.get((kind, name))
        if known is None:
            known = self._copies[kind, name] = torch.empty(tensor.shape, dtype=torch.float32)
        return known.copy_(tensor)

    @property
    def pending(self) -> bool:
        """Whether an asynchronous save is not complete yet; the same on all ranks."""
        return self._thread is not None

    def poll(self) -> Path | None:
        """Complete an asynchronous save when all ranks have written; all ranks call it, between steps.

        Returns:
            The finished folder once, else None.
        """
        if self._thread is None or self.runtime.any_rank(self._thread.is_alive()):
            return None
        self._thread = None
        return self._publish()

    def finish(self) -> Path | None:
        """Wait for an asynchronous save and complete it; all ranks call it."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._publish()

    def _publish(self) -> Path:
        """Give the checkpoint its final name, after all ranks have written their files."""
        step = self._manifest["step"]
        final, partial = self.root / folder_name(step), self.root / f".{folder_name(step)}.partial"
        found = self.runtime.gather(self._written)
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(found) if problem]
        if problems:
            self.runtime.run_on_rank0(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise CheckpointError(
                f"checkpoint of step {step} in {self.root}: {problems[0]}; the ones before are untouched"
            )

        def publish() -> None:
            files = [entry for files, _ in found for entry in files]
            write_json(partial / "checkpoint.json", {**self._manifest, "files": files})
            publish_directory(partial, final)

        self.runtime.run_on_rank0(lambda: _explained(publish, partial))
        return final


def _explained(action: Any, path: Path) -> None:
    try:
        action()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}): {advice(error)}") from error


def prune(root: Path, keep_last: int, permanent: set[int], warn: Callable[[int, str], None] | None = None) -> list[int]:
    """Delete the oldest checkpoints that are neither permanent nor among the newest `keep_last` (0: keep all).

    Args:
        warn: told the step, and why, of a checkpoint that stays because it holds what this tool did not write.

    Returns:
        The steps that were deleted.
    """
    if keep_last == 0:
        return []
    deleted = []
    for step in [step for step in steps_saved(root) if step not in permanent][:-keep_last]:
        folder = root / folder_name(step)
        found = strangers(folder, strict=True)
        if found and warn is not None:
            warn(
                step,
                f"{folder} is kept beyond checkpoint.keep_last={keep_last}: it holds {enumerated(found)}, not as this run "
                "wrote it: move it away, or delete the checkpoint yourself",
            )
        if found:
            continue
        remove_directory(folder)
        deleted.append(step)
    return deleted


_HIDDEN_NAME = re.compile(r"\.(step_\d{8})\.(partial|replaced|deleted)")


def clean_up(root: Path) -> None:
    """Put in order what a run that was killed while saving left: a checkpoint that was set aside comes back, and what is
    unfinished goes. Only under the names that saving and pruning give."""
    for hidden in sorted(root.glob(".step_*")):
        name = _HIDDEN_NAME.fullmatch(hidden.name)
        if name is None:
            continue
        if name.group(2) == "replaced":
            recover_directory(root / name.group(1))
        elif name.group(2) == "deleted":
            finish_removal(root / name.group(1))
        else:
            shutil.rmtree(hidden, ignore_errors=True)


def newest_valid(runtime: Runtime, root: Path, go_back: bool) -> tuple[Path, list[str]] | None:
    """The newest checkpoint whose files are what was written; all ranks call it and share the checking.

    Args:
        go_back: when the newest is corrupt, take the one before.

    Raises:
        CheckpointError: the newest is corrupt and `go_back` is off, or all are.

    Returns:
        Its folder, and what was wrong with the newer ones; None when there is no checkpoint.
    """
    corrupt: list[str] = []
    runtime.run_on_rank0(lambda: _explained(lambda: clean_up(root), root))
    for step in reversed(runtime.run_on_rank0(lambda: steps_saved(root))):
        folder, problem = root / folder_name(step), None
        try:
            verify(folder, read_manifest(folder), share=(runtime.rank, runtime.size))
        except CheckpointError as error:
            problem = str(error)
        problems = [one for one in runtime.gather(problem) if one]
        if not problems:
            return folder, corrupt
        if not go_back:
            raise CheckpointError(f"{problems[0]}, or let --checkpoint.on_damage previous choose it")
        corrupt.append(problems[0])
    if corrupt:
        raise CheckpointError(f"every checkpoint in {root} is corrupt; the newest: {corrupt[0]}")
    return None


def load(engine: Engine, folder: Path) -> dict[str, Any]:
    """Fill an engine's weights and moments from a checkpoint of any layout; all ranks call it.

    Args:
        folder: a valid checkpoint, see `newest_valid`.

    Raises:
        CheckpointError: it is of another model.

    Returns:
        The manifest.
    """
    reader = CheckpointReader(folder)
    # An imported model has no moments: Adam starts anew, as the engine has it.
    kinds = [kind for kind in KINDS if kind in reader.kinds]
    for tensor in engine.map:
        for kind in kinds:
            local = torch.empty(tensor.shape, dtype=torch.float32)
            for part in tensor.parts:
                part.view(local).copy_(reader.read(kind, part.logical.name, part.start, part.shape))
            engine.state.set(tensor, kind, local.to(engine.runtime.device))
    engine.state.step = reader.manifest["adam_step"]
    return reader.manifest
