"""Looking at checkpoints: what is in one, whether it is valid, and where two differ.

Works on files alone, one tensor at a time and of that a chunk at a time: neither a model nor its memory is needed.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megagamma.checkpoint.manifest import MANIFEST, check_complete, is_sealed, sealed
from megagamma.checkpoint.reader import CheckpointReader, read_manifest, verify
from megagamma.config.io import current_form
from megagamma.errors import CheckpointError
from megagamma.files import write_json
from megagamma.initialization.report import WeightStatistics

_CHUNK = 1 << 22  # elements that are looked at together; unit: 32 MiB of float64


def natural(name: str) -> tuple[Any, ...]:
    """Sorting key of a tensor's name: layers by number, the head last."""
    parts = re.split(r"(\d+)", name)
    return (not name.startswith("model."), *(int(part) if part.isdigit() else part for part in parts))


def _chunks(tensor: Tensor) -> list[Tensor]:
    return list(tensor.reshape(-1).split(_CHUNK))


def describe(folder: Path) -> dict[str, Any]:
    """What is in a checkpoint, as plain values: units in the names. The table does not depend on the layout.

    Raises:
        CheckpointError: it is corrupt.
    """
    reader = CheckpointReader(folder)
    manifest, weights = reader.manifest, 0
    rows: list[dict[str, Any]] = []
    verify(folder, manifest, full=False)
    for name in sorted(reader.names(), key=natural):
        tensor = reader.read("weight", name)
        statistics = WeightStatistics.of(tensor)
        bad = sum(int((~chunk.isfinite()).sum()) for chunk in _chunks(tensor))
        weights += tensor.numel()
        rows.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "std": statistics.std if not bad else math.nan,
                "rms": statistics.rms if not bad else math.nan,
                "not_finite": bad,
            }
        )
    kinds = dict.fromkeys(entry["kind"] for entry in manifest["files"])
    return {
        "folder": str(folder),
        "format_version": manifest["version"],
        "step": manifest["step"],
        "adam_step": manifest["adam_step"],
        "samples": manifest["consumed_samples"],
        "tokens": manifest["consumed_samples"] * manifest["config"]["data"]["sequence_length"],
        "training_seconds": manifest["seconds"],
        "tensors": rows,
        "weights": weights,
        "kinds": {kind: sum(len(e["tensors"]) for e in manifest["files"] if e["kind"] == kind) for kind in kinds},
        "files": [{key: entry[key] for key in ("file", "kind", "bytes")} for entry in manifest["files"]],
        "total_bytes": sum(entry["bytes"] for entry in manifest["files"]),
    }


def verify_files(folder: Path, full: bool = True) -> list[dict[str, Any]]:
    """Check every file of a checkpoint.

    Args:
        folder: the checkpoint.
        full: checksums too, not only sizes.

    Returns:
        File, problem ("" for a valid one) and note, for the manifest and then every file that it lists.
    """
    try:
        manifest = read_manifest(folder)
        shapes = check_complete(folder, manifest)
    except CheckpointError as error:
        return [{"file": MANIFEST, "problem": str(error), "note": ""}]
    note = "" if is_sealed(manifest) else "no checksum of its own: `seal` adds one"
    found = [{"file": MANIFEST, "problem": "", "note": note}]
    files = manifest["files"]
    for index, entry in enumerate(files):
        problem = ""
        try:
            verify(folder, manifest, full, share=(index, len(files)), shapes=shapes)
        except CheckpointError as error:
            problem = str(error)
        found.append({"file": entry["file"], "problem": problem, "note": ""})
    return found


def seal(folder: Path) -> bool:
    """Give the manifest of a checkpoint of an earlier version its checksum, after all of it has been checked.

    Raises:
        CheckpointError: the checkpoint is corrupt; it stays as it is.
        MegagammaError: the manifest cannot be written.

    Returns:
        Whether it was added: False where one is there.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest, shapes=check_complete(folder, manifest))
    if is_sealed(manifest):
        return False
    write_json(folder / MANIFEST, sealed(manifest))
    return True


@dataclass(frozen=True)
class TensorDifference:
    """One logical tensor of two checkpoints."""

    kind: str
    name: str
    absolute: float
    """Largest |a - b|; infinite where only one of the two numbers is finite."""
    relative: float
    """`absolute` over the largest |a| or |b| of the tensor: an element near 0 alone does not make it large."""
    note: str = ""
    """Why they cannot be compared: the tensor is in one only, or has another shape."""


def compare_tensors(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute and relative difference of two tensors of one shape, as in `TensorDifference`."""
    absolute = largest = 0.0
    for left, right in zip(_chunks(a), _chunks(b), strict=True):
        left, right = left.double(), right.double()
        same = (left == right) | (left.isnan() & right.isnan())
        gap = (left - right).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        size = left.abs().maximum(right.abs())
        absolute = max(absolute, float(gap.max()) if gap.numel() else 0.0)
        largest = max(largest, float(size[size.isfinite()].max()) if bool(size.isfinite().any()) else 0.0)
    if absolute == 0.0:
        return 0.0, 0.0
    return absolute, absolute / largest if largest and math.isfinite(absolute) else math.inf


def compare(folder_a: Path, folder_b: Path) -> list[TensorDifference]:
    """Every weight and moment of two checkpoints, in the order of the model, kind by kind.

    Raises:
        CheckpointError: one is corrupt.
    """
    a, b = CheckpointReader(folder_a), CheckpointReader(folder_b)
    for reader in (a, b):
        verify(reader.folder, reader.manifest, full=False)

    def tensors(reader: CheckpointReader) -> set[tuple[str, str]]:
        return {(entry["kind"], name) for entry in reader.manifest["files"] for name in entry["tensors"]}

    in_a, in_b = tensors(a), tensors(b)
    kinds = {entry["kind"]: None for reader in (a, b) for entry in reader.manifest["files"]}
    order = {kind: index for index, kind in enumerate(kinds)}
    found = []
    for kind, name in sorted(in_a | in_b, key=lambda pair: (order[pair[0]], natural(pair[1]))):
        if (kind, name) not in in_a or (kind, name) not in in_b:
            note = "only in the " + ("first" if (kind, name) in in_a else "second")
            found.append(TensorDifference(kind, name, math.inf, math.inf, note))
            continue
        left, right = a.read(kind, name), b.read(kind, name)
        if left.shape != right.shape:
            note = f"{list(left.shape)} and {list(right.shape)}"
            found.append(TensorDifference(kind, name, math.inf, math.inf, note))
            continue
        found.append(TensorDifference(kind, name, *compare_tensors(left, right)))
    return found


def config_differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Options that differ between two checkpoints' configs, as `section.key: a -> b`; those of older formats too."""
    found = []
    for key in dict.fromkeys([*a, *b]):
        left, right = a.get(key, "(not an option)"), b.get(key, "(not an option)")
        if not prefix and isinstance(left, dict) and isinstance(right, dict):
            found += config_differences(left, right, f"{key}.")
        elif left != right:
            found.append(f"{prefix}{key}: {left} -> {right}")
    return found


def difference(folder_a: Path, folder_b: Path, tolerance: float = 0.0) -> dict[str, Any]:
    """Two checkpoints side by side, as plain values.

    Args:
        folder_a: a checkpoint.
        folder_b: another.
        tolerance: a tensor differs when its relative difference is larger.

    Raises:
        CheckpointError: one is corrupt.
    """
    first, second = read_manifest(folder_a), read_manifest(folder_b)
    tensors = compare(folder_a, folder_b)
    differ = [row for row in tensors if row.note or row.relative > tolerance]
    return {
        "folders": [str(folder_a), str(folder_b)],
        "steps": [first["step"], second["step"]],
        "samples": [first["consumed_samples"], second["consumed_samples"]],
        "tolerance": tolerance,
        "equal": not differ,
        "compared": len(tensors),
        "largest_relative": max((row.relative for row in tensors), default=0.0),
        "different": [asdict(row) for row in differ],
        "knobs": config_differences(current_form(first["config"]), current_form(second["config"])),
    }
