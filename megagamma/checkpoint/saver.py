"""Checkpoints by logical name: fp32 weights and Adam moments that load on any layout.

A checkpoint is a folder `checkpoints/step_00001000/` with files `weight-*.safetensors`, `exp_avg-*.safetensors` and
`exp_avg_sq-*.safetensors`, whose tensors have their logical names and shapes (`megagamma.model.parameters`) whatever
the layout that wrote them, and `checkpoint.json`: step, samples, config, every file's tensors, size and checksum, and
a checksum of its own (`megagamma.checkpoint.manifest`). There is no pickle in it. Files are written in a hidden folder
and renamed when all are complete, so a folder under its final name is whole. `torch.distributed.checkpoint` reads it
with its `HuggingFaceStorageReader`; its writer is not used, since it wants the whole state at once, where here one
tensor at a time is gathered.

Every rank writes a share of the logical tensors. To do so it gathers one tensor at a time, over the data-parallel
ranks that ZeRO has partitioned it over and the tensor-parallel ranks that it is split over.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagamma.checkpoint.manifest import MANIFEST, sealed
from megagamma.checkpoint.reader import (
    FORMAT_VERSION,
    CheckpointReader,
    folder_name,
    read_manifest,
    tensor_key,
    verify_all,
)
from megagamma.checkpoint.retention import clean_up, explained
from megagamma.checkpoint.safetensors_writer import ShardWriter
from megagamma.distributed.engine import Engine
from megagamma.distributed.runtime import Runtime
from megagamma.errors import CheckpointError, MegagammaError
from megagamma.files import advice, write_json
from megagamma.folders import publish_directory
from megagamma.model.parameters import KINDS, LogicalParameter, MappedTensor, Part


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


def _assemble(unit: _WorkUnit, local: Tensor, runtime: Runtime) -> list[Tensor] | None:
    """The logical tensor on its owner, as slices along its first axis; None on the other tensor-parallel ranks.

    Slices that no other rank takes part in are views of `local`.
    """
    slices = [part.view(local) for part in unit.parts]
    axis = unit.logical.split_axis
    is_owner = runtime.tensor_rank == unit.tensor_owner
    if axis is None or runtime.tensor_size == 1:
        return slices if is_owner else None
    group, shard = runtime.tensor_group, _joined(slices).contiguous()
    shards = [torch.empty_like(shard) for _ in range(runtime.tensor_size)] if is_owner else None
    dist.gather(shard, shards, dst=dist.get_global_rank(group, unit.tensor_owner), group=group)
    return [torch.cat(shards, dim=axis)] if shards is not None else None


def _joined(slices: list[Tensor]) -> Tensor:
    return slices[0] if len(slices) == 1 else torch.cat(slices)


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
    """(kind, name, whole logical tensor) of what this rank writes, one at a time.

    A collective: all ranks must run it to its end. A tensor may be a view of the engine's state: it is valid until the
    next one is taken or a step is made, and must not be written to.
    """
    return ((kind, name, _joined(slices)) for kind, name, slices in _sliced_tensors(engine, kinds))


def _sliced_tensors(engine: Engine, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[str, str, list[Tensor]]]:
    """As `whole_tensors`, every tensor as slices along its first axis, which cost no memory."""
    runtime, units = engine.runtime, _work_units(engine)
    for kind in kinds:
        local, current = None, None
        for unit in units:
            if unit.tensor is not current:
                local, current = engine.state.get(unit.tensor, kind), unit.tensor
            if unit.data_owner != runtime.data_rank:
                continue
            assert local is not None
            slices = _assemble(unit, local, runtime)
            if slices is not None:
                yield kind, unit.logical.name, slices


def whole_states(engine: Engine) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, {kind: whole logical tensor}) of what this rank owns, one name at a time: weight and both moments.

    A collective, as `whole_tensors`; a tensor may be a view of the engine's state.
    """
    runtime, local, current = engine.runtime, {}, None
    for unit in _work_units(engine):
        if unit.tensor is not current:
            local, current = {kind: engine.state.get(unit.tensor, kind) for kind in KINDS}, unit.tensor
        if unit.data_owner != runtime.data_rank:
            continue
        parts = {kind: _assemble(unit, values, runtime) for kind, values in local.items()}
        whole = {kind: _joined(slices) for kind, slices in parts.items() if slices is not None}
        if whole:
            yield unit.logical.name, whole


def _reason(error: BaseException) -> str:
    """Why a file could not be written, in words for a user."""
    if isinstance(error, OSError):
        return f"cannot be written ({error.strerror or error}): {advice(error)}"
    return f"cannot be written ({type(error).__name__}: {error})"


@dataclass
class _Save:
    """One save on this rank: what it writes, and what became of it. Nothing of it outlives the save."""

    step: int
    partial: Path
    manifest: dict[str, Any]
    owned: dict[str, list[LogicalParameter]]
    files: list[dict[str, Any]] = field(default_factory=list)
    """Entries for the manifest, of files that are complete."""
    problem: str | None = "cannot be written (it was not written to its end)"
    """None when all that this rank owns is written."""
    thread: threading.Thread | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    """Set when an asynchronous save no longer looks at the engine's state."""

    def write(self, tensors: Iterable[tuple[str, str, Tensor]], rank: int) -> None:
        """Write this rank's tensors.

        After a problem the tensors are still taken to the end, since other ranks may take part in gathering them.
        """
        # A file is synced while the next one is written.
        with ThreadPoolExecutor(1, f"sync-{self.step}") as pool:
            self.problem = self._write(tensors, rank, pool)

    def _write(self, tensors: Iterable[tuple[str, str, Tensor]], rank: int, pool: ThreadPoolExecutor) -> str | None:
        """`write`; what closes files runs in `pool`. Returns the problem, if there is one."""
        writer: ShardWriter | None = None
        closing: list[tuple[str, ShardWriter, Future[tuple[int, str]]]] = []
        problem: str | None = None
        left = {kind: len(parameters) for kind, parameters in self.owned.items()}
        for kind, name, tensor in tensors:
            if problem is not None:
                continue
            try:
                if writer is None:
                    entries = [(tensor_key(kind, parameter.name), parameter.shape) for parameter in self.owned[kind]]
                    writer = ShardWriter(self.partial / f"{kind}-{rank:05d}.safetensors", entries)
                writer.write(tensor_key(kind, name), tensor)
                left[kind] -= 1
                if left[kind] == 0:
                    closing.append((kind, writer, pool.submit(writer.close)))
                    writer = None
            except Exception as error:  # noqa: BLE001 - the other ranks must hear of it, whatever it is
                problem = _reason(error)
                if writer is not None:
                    writer.abandon()
        for kind, closed, future in closing:
            try:
                size, digest = future.result()
                names = [parameter.name for parameter in self.owned[kind]]
                self.files.append(
                    {"file": closed.path.name, "kind": kind, "bytes": size, "xxh3_128": digest, "tensors": names}
                )
            except Exception as error:  # noqa: BLE001 - as above
                problem = problem or _reason(error)
                closed.abandon()
        if problem is None and any(left.values()):
            problem = f"cannot be written ({sum(left.values())} tensors were not given)"
        return problem

    def write_in_thread(self, copy: Callable[[], list[tuple[str, str, Tensor]]], rank: int) -> None:
        """`write` what `copy` gives, for a thread, where nobody would see what it raises."""
        try:
            try:
                copies = copy()
            finally:
                self.copied.set()
            self.write(copies, rank)
        except BaseException as error:  # noqa: BLE001 - becomes the problem of this save
            self.problem = _reason(error)


class Saver:
    """Writes a run's checkpoints, one at a time: at once, or in a thread while training continues."""

    def __init__(self, engine: Engine, root: Path) -> None:
        """Args: root: folder of the run's checkpoints."""
        self.engine, self.runtime, self.root = engine, engine.runtime, root
        self._pending: _Save | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}

    def save(self, step: int, state: dict[str, Any], asynchronous: bool = False) -> Path | None:
        """Write a checkpoint; all ranks call it.

        Args:
            step: optimizer steps done.
            state: what else a resume needs (JSON): config, consumed samples, tokenizer, guard.
            asynchronous: copy the state to memory, or begin to, and return; `wait_for_copy` must be called before it is
                changed, and `poll` or `finish` completes the save. Only this rank's share is copied.

        Raises:
            CheckpointError: on every rank, when one could not write, such as on a full disk. What was there before
                stays. Of an asynchronous save, `poll` or `finish` raises it.

        Returns:
            The finished folder, or None while it is being written.
        """
        self.finish()
        partial, final = self.root / f".{folder_name(step)}.partial", self.root / folder_name(step)
        manifest = {
            "format": "megagamma checkpoint",
            "version": FORMAT_VERSION,
            "step": step,
            "adam_step": self.engine.state.step,
            **state,
        }

        def begin() -> None:
            if final.is_symlink():
                raise CheckpointError(
                    f"{final}: is a link, and the checkpoint of step {step} needs its name: give the link another name"
                )
            clean_up(self.root)
            partial.mkdir(parents=True)

        self.runtime.run_on_rank0(lambda: explained(begin, partial))
        save = _Save(step, partial, manifest, _owned(self.engine))
        if not asynchronous:
            save.write(whole_tensors(self.engine), self.runtime.rank)
            return self._publish(save)
        self._begin(save, _sliced_tensors(self.engine))
        self._pending = save
        return None

    def _begin(self, save: _Save, tensors: Iterable[tuple[str, str, list[Tensor]]]) -> None:
        """Copy this rank's share to memory, and write it in a thread."""
        taken: list[tuple[str, str, list[Tensor]]] = []
        problem: str | None = None
        # Without ZeRO and shards they are the state itself, which stays until the next update: copied in the thread.
        is_late = self.engine.zero_stage == 0 and self.runtime.tensor_size == 1
        for kind, name, slices in tensors:
            try:
                if problem is None:
                    taken.append((kind, name, slices if is_late else [self._copy(kind, name, slices)]))
            except Exception as error:  # noqa: BLE001 - the other ranks gather on, and must hear of it
                problem = _reason(error)

        def copies() -> list[tuple[str, str, Tensor]]:
            return [
                (kind, name, self._copy(kind, name, slices) if is_late else slices[0]) for kind, name, slices in taken
            ]

        try:
            if problem is None:
                save.thread = threading.Thread(
                    target=save.write_in_thread, args=(copies, self.runtime.rank), name=f"save-{save.step}"
                )
                save.thread.start()
        except RuntimeError as error:  # no more threads
            problem, save.thread = _reason(error), None
        if problem is not None:
            save.problem = problem

    def wait_for_copy(self) -> None:
        """Return when an asynchronous save no longer needs the engine's state; called before every update."""
        if self._pending is not None and self._pending.thread is not None:
            self._pending.copied.wait()

    def _copy(self, kind: str, name: str, slices: list[Tensor]) -> Tensor:
        """A copy in memory that is kept for the next save: fresh memory costs more time than the copy."""
        rows = [len(one) for one in slices]
        known = self._copies.get((kind, name))
        if known is None:
            known = self._copies[kind, name] = torch.empty(sum(rows), *slices[0].shape[1:], dtype=torch.float32)
        for target, source in zip(known.split(rows), slices, strict=True):
            target.copy_(source)
        return known

    @property
    def pending(self) -> bool:
        """Whether an asynchronous save is not complete yet; the same on all ranks."""
        return self._pending is not None

    def poll(self) -> Path | None:
        """Complete an asynchronous save when all ranks have written; all ranks call it, between steps.

        Raises:
            CheckpointError: on every rank, when one could not write; nothing is published.

        Returns:
            The finished folder once, else None.
        """
        save = self._pending
        if save is None or self.runtime.any_rank(save.thread is not None and save.thread.is_alive()):
            return None
        self._pending = None
        return self._publish(save)

    def finish(self) -> Path | None:
        """Wait for an asynchronous save and complete it; all ranks call it.

        Raises:
            CheckpointError: as of `poll`.
        """
        save, self._pending = self._pending, None
        if save is None:
            return None
        if save.thread is not None:
            save.thread.join()
        return self._publish(save)

    def _publish(self, save: _Save) -> Path:
        """Give the checkpoint its final name, after all ranks have written their files and rank 0 has checked them.

        Checked are the list of tensors, which must be the model's, each once and of its shape, and the size and header of
        every file. What the files hold is not read again: their checksums are of what was handed to the disk, and a
        resume compares them.
        """
        final, partial = self.root / folder_name(save.step), save.partial
        found = self.runtime.gather((save.files, save.problem))
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(found) if problem]

        def publish() -> None:
            try:
                files = [entry for files, _ in found for entry in files]
                write_json(partial / MANIFEST, sealed({**save.manifest, "files": files}))
                # Under its hidden name still: what is wrong with it never becomes a checkpoint.
                verify_all(partial, read_manifest(partial), full=False)
                publish_directory(partial, final)
            except MegagammaError as error:
                raise CheckpointError(str(error)) from error
            except Exception as error:
                raise CheckpointError(f"{partial}: {_reason(error)}") from error

        try:
            if problems:
                raise CheckpointError(problems[0])
            self.runtime.run_on_rank0(publish)
        except CheckpointError as error:
            self.runtime.run_on_rank0(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise CheckpointError(
                f"checkpoint of step {save.step} in {self.root}: {error}; the ones before are untouched"
            ) from None
        return final


def load(engine: Engine, folder: Path, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fill an engine's weights and moments from a checkpoint of any layout; all ranks call it.

    Args:
        folder: a valid checkpoint, see `newest_valid`.
        manifest: its, when it is read already.

    Raises:
        CheckpointError: it is of another model: every tensor must have exactly the shape of the model's.

    Returns:
        The manifest.
    """
    reader = CheckpointReader(folder, manifest)
    # An imported model has no moments, and says so: Adam starts anew.
    has_moments = reader.kinds == set(KINDS)
    for tensor in engine.map:
        for kind in KINDS:
            if kind == "weight" or has_moments:
                slices = [
                    (part, reader.read(kind, part.logical.name, part.start, part.shape, part.logical.shape))
                    for part in tensor.parts
                ]
            else:
                slices = []
            if len(slices) == 1 and slices[0][1].shape == tensor.shape:
                local = slices[0][1]  # as it is mapped from the file
            else:
                local = torch.zeros(tensor.shape, dtype=torch.float32)
                for part, values in slices:
                    part.view(local).copy_(values)
            engine.state.set(tensor, kind, local.to(engine.runtime.device))
    engine.state.step = reader.manifest["adam_step"]
    return reader.manifest
