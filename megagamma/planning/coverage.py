"""Whether the slices of all ranks make up every logical matrix exactly once.

Ranks that differ in their data-parallel number alone hold copies, or under ZeRO 3 shards of one tensor, so that one rank for
each pair of tensor-parallel and pipeline rank is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megagamma.config.schema import ModelConfig
from megagamma.model.parameters import LogicalParameter, Part, logical_parameters

Coordinate = tuple[int, int]
"""Tensor-parallel and pipeline rank."""


@dataclass(frozen=True)
class HeldTensor:
    """One tensor of a rank, without the tensor."""

    name: str
    """Megatron's, on its pipeline stage."""
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    is_copy: bool
    """Whether it is the last stage's copy of a tied embedding."""


@dataclass(frozen=True)
class _Slice:
    first: int
    end: int
    """Along the split axis."""
    holder: Coordinate

    def __str__(self) -> str:
        return f"{self.first} to {self.end - 1} of tensor rank {self.holder[0]} on stage {self.holder[1]}"


def coverage_problems(
    model: ModelConfig, held: Mapping[Coordinate, Iterable[HeldTensor]], tensor_size: int
) -> list[str]:
    """What is not covered exactly once, by the logical parameter's name; empty when everything is.

    A split matrix must be held once by the tensor-parallel ranks of one stage between them. A replicated parameter must be
    held whole by every tensor-parallel rank of one stage. So must the copy of a tied embedding on the last stage.

    Args:
        model: resolved, vocabulary known.
        held: the tensors of every pair of tensor-parallel and pipeline rank.
        tensor_size: tensor-parallel ranks.
    """
    problems: list[str] = []
    slices: dict[tuple[str, bool], list[_Slice]] = {}
    expected = {logical.name: logical for logical in logical_parameters(model)}
    for holder, tensors in held.items():
        for tensor in tensors:
            problems += _local_problems(tensor, holder)
            for part in tensor.parts:
                logical = expected.get(part.logical.name)
                if logical is None or logical != part.logical:
                    problems.append(
                        f"{part.logical.name}: {_where(tensor, holder)} holds it, the model has no such matrix"
                    )
                    continue
                problem = _shape_problem(part, logical)
                if problem:
                    problems.append(f"{logical.name}: {_where(tensor, holder)} {problem}")
                    continue
                axis = logical.split_axis or 0
                start = part.start[axis]
                slices.setdefault((logical.name, tensor.is_copy), []).append(
                    _Slice(start, start + part.shape[axis], holder)
                )
    for name, logical in expected.items():
        for is_copy in (False, True):
            found = slices.get((name, is_copy), [])
            if found or not is_copy:
                what = f"{name} (copy for the head)" if is_copy else name
                problems += [f"{what}: {problem}" for problem in _gaps(logical, found, tensor_size)]
    return problems


def _where(tensor: HeldTensor, holder: Coordinate) -> str:
    return f"{tensor.name} of tensor rank {holder[0]} on stage {holder[1]}"


def _local_problems(tensor: HeldTensor, holder: Coordinate) -> list[str]:
    """Rows of a local tensor that belong to no part, or to two."""
    row = 0
    for part in sorted(tensor.parts, key=lambda part: part.rows):
        if part.rows[0] != row:
            what = "no part has" if part.rows[0] > row else "two parts have"
            return [f"{part.logical.name}: {what} row {min(row, part.rows[0])} of {_where(tensor, holder)}"]
        row = part.rows[1]
    if row != tensor.shape[0]:
        return [
            f"{tensor.parts[-1].logical.name}: its parts end at row {row} of {tensor.shape[0]} of {_where(tensor, holder)}"
        ]
    return []


def _shape_problem(part: Part, logical: LogicalParameter) -> str:
    """What is wrong with a part on its own: it must be full along every axis but the split one, and inside."""
    for axis, (first, size, whole) in enumerate(zip(part.start, part.shape, logical.shape, strict=True)):
        if axis == (logical.split_axis or 0):
            if not 0 <= first < first + size <= whole:
                return f"holds {first} to {first + size - 1} of axis {axis}, which ends at {whole - 1}"
        elif (first, size) != (0, whole):
            return f"holds {size} of {whole} along axis {axis}, which is not split"
    return ""


def _gaps(logical: LogicalParameter, slices: list[_Slice], tensor_size: int) -> list[str]:
    """What of one logical parameter is held by no rank, or by several."""
    if not slices:
        return ["no rank holds it"]
    stages = sorted({one.holder[1] for one in slices})
    if len(stages) > 1:
        return [f"stages {', '.join(map(str, stages))} hold it: one must"]
    if logical.split_axis is None:
        whole = [one.holder[0] for one in slices if (one.first, one.end) == (0, logical.shape[0])]
        if sorted(whole) == list(range(tensor_size)) and len(whole) == len(slices):
            return []
        return [f"tensor ranks {sorted(whole)} hold it whole: each of 0 to {tensor_size - 1} must, once"]
    end, before = 0, None
    for one in sorted(slices, key=lambda one: (one.first, one.end)):
        if one.first > end:
            return [f"no rank holds {end} to {one.first - 1} of axis {logical.split_axis}"]
        if one.first < end:
            return [f"two ranks hold the same of axis {logical.split_axis}: {before}, and {one}"]
        end, before = one.end, one
    whole_axis = logical.shape[logical.split_axis]
    return [] if end == whole_axis else [f"no rank holds {end} to {whole_axis - 1} of axis {logical.split_axis}"]
