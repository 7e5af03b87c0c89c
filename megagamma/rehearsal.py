"""A run at its true size without its machines: rank r of any layout is started through the code of a real start.

torch's fake process group gives this process the place of any rank, and fake tensors give the model's tensors no memory.
Runtime, process groups, model, parameter map, optimizer groups and `deepspeed.initialize` are those of a real start, on a
CPU; what is left out is the weights' values, every byte that another rank would send, and the device.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megagamma.config.resolve import planned_dtype
from megagamma.config.rules import data_parallel_size
from megagamma.config.schema import Config
from megagamma.distributed.compat.deepspeed import gradient_bytes, local_partition, padded_elements
from megagamma.distributed.compat.megatron import own_groups_only
from megagamma.distributed.compat.torch import fake_tensors, fake_world
from megagamma.distributed.engine import Engine
from megagamma.distributed.runtime import Runtime
from megagamma.environment import World
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.model.parameters import ParameterMap, Part
from megagamma.planning.coverage import Coordinate, HeldTensor, coverage_problems
from megagamma.planning.drawing import Drawing, measure_drawing
from megagamma.planning.memory import MemoryPlan, plan
from megagamma.training.assembly import build
from megagamma.training.optimizer import parameter_groups


@dataclass(frozen=True)
class HeldBytes:
    """What a rank that was started holds between steps, gradients added as if they were there. Unit: bytes."""

    parameters: int
    """Elements of its tensor-parallel and pipeline shard, before ZeRO. Not bytes."""
    weights: int
    gradients: int
    optimizer: int
    """fp32 master weights, where they are kept, and Adam's moments."""
    padding: float
    """DeepSpeed's in the three, by its rule: the partitions of a group are equal. A share, so that it may be a fraction."""


@dataclass(frozen=True)
class StartedRank:
    """A rank that was started up to the first step."""

    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    held: HeldBytes | None
    """None where the start did not come to its end."""
    stopped: str = ""
    """Where and why it did not: file, line and message."""


@dataclass
class Rehearsal:
    """What was rehearsed, and what is wrong."""

    world_size: int
    tensor: int
    pipeline: int
    data: int
    dtype: str
    memory: MemoryPlan
    tensors: dict[Coordinate, list[HeldTensor]]
    """What every pair of tensor-parallel and pipeline rank holds."""
    started: list[StartedRank]
    drawing: Drawing | None
    """None where it was left out."""
    problems: list[str] = field(default_factory=list)


def first_ranks(tensor: int, pipeline: int, data: int) -> dict[Coordinate, int]:
    """The first rank of every pair of tensor-parallel and pipeline rank: Megatron-core counts tensor, data, pipeline."""
    return {(t, p): t + tensor * data * p for p in range(pipeline) for t in range(tensor)}


def rehearse(config: Config, world_size: int, ranks: Sequence[int] | None = None, draws: bool = True) -> Rehearsal:
    """Build every distinct rank of a run, start some of them, and check them against the model and the memory plan.

    Args:
        config: resolved and validated for `world_size`, vocabulary known.
        world_size: processes of the run.
        ranks: to start up to the first step; None: the first one of every pipeline stage.
        draws: whether to draw a slice of the largest matrix.

    Raises:
        ConfigurationError: a rank that is not in the world.
        RuntimeError: this process is in a world already.
    """
    data = data_parallel_size(config, world_size)
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    firsts = first_ranks(tensor, pipeline, data)
    starting = [firsts[0, stage] for stage in range(pipeline)] if ranks is None else list(dict.fromkeys(ranks))
    for rank in starting:
        if not 0 <= rank < world_size:
            raise ConfigurationError(f"ranks={rank} must be a rank of the world: use 0 to {world_size - 1}")
    device: Literal["cpu", "cuda"] = "cpu" if config.run.device == "cpu" else "cuda"
    dtype = planned_dtype(config, data, device)
    memory = plan(config, world_size)
    found = Rehearsal(world_size, tensor, pipeline, data, dtype, memory, {}, [], None)
    # The plan is for the device that the run is meant for; the start itself is made here.
    here = copy.deepcopy(config)
    here.run.device = "cpu"
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    with own_groups_only():
        for rank in dict.fromkeys([*firsts.values(), *starting]):
            with fake_world(rank, world_size):
                try:
                    _rehearse_rank(here, World(rank, world_size, 0, 1), torch_dtype, rank in starting, found)
                finally:
                    Runtime.close()
    found.started.sort(key=lambda one: one.rank)
    found.problems += [f"no rank has tensor rank {t} on stage {p}" for t, p in firsts if (t, p) not in found.tensors]
    found.problems += coverage_problems(config.model, found.tensors, tensor)
    for one in found.started:
        found.problems += memory_problems(one, memory)
    if draws:
        found.drawing = measure_drawing(config, _largest_part(found.tensors), torch_dtype)
        found.problems += [found.drawing.problem] if found.drawing.problem else []
    return found


def _rehearse_rank(config: Config, world: World, dtype: torch.dtype, starts: bool, found: Rehearsal) -> None:
    """Lay one rank out, record what it holds, and start it where asked."""
    runtime = Runtime(config, world)
    where = runtime.tensor_rank, runtime.pipeline_rank
    with fake_tensors():
        chunks, parameter_map = build(config, runtime, dtype)
        tensors = held_tensors(parameter_map)
        if found.tensors.setdefault(where, tensors) != tensors:
            found.problems.append(f"rank {world.rank} holds other tensors than the first rank of its place {where}")
        if starts:
            held, stopped = start(config, runtime, chunks, parameter_map, found.memory.zero_stage)
            found.started.append(StartedRank(world.rank, *where, runtime.data_rank, held, stopped))


def held_tensors(parameter_map: ParameterMap) -> list[HeldTensor]:
    """What a map says of its tensors, without them."""
    return [HeldTensor(one.name, one.shape, one.parts, one.is_copy) for one in parameter_map]


def start(
    config: Config, runtime: Runtime, chunks: list[Any], parameter_map: ParameterMap, stage: int
) -> tuple[HeldBytes | None, str]:
    """Hand one rank's model to DeepSpeed, as a real start does, and let go of it again.

    Args:
        chunks, parameter_map: this rank's, as `build` gives them.
        stage: of ZeRO.

    Returns:
        What the rank then holds; or None, and where it stopped.
    """
    parameter_map.mark_tensor_parallel()
    elements = {id(one.parameter): _product(one.shape) for one in parameter_map}
    weights = [one.parameter for one in parameter_map]
    groups = parameter_groups(parameter_map, config)
    counts = [[elements[id(parameter)] for parameter in group["params"]] for group in groups]
    try:
        engine = Engine(config, runtime, chunks, parameter_map, groups)
    except MegagammaError:
        raise
    except Exception as error:  # noqa: BLE001 - reported, with its place
        last = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{last.filename}:{last.lineno}: {type(error).__name__}: {str(error).splitlines()[0]}"
    try:
        flat = engine.state.flat_parameters()
        moments = [engine.state.adam.state[one] for one in flat]
        optimizer = sum(state[kind].nbytes for state in moments for kind in ("exp_avg", "exp_avg_sq"))
        optimizer += sum(one.nbytes for one in flat) if stage else 0  # masters
        return HeldBytes(
            sum(map(sum, counts)),
            sum(local_partition(one).nbytes for one in weights),
            gradient_bytes(engine.optimizer, stage, weights),
            optimizer,
            _padding_bytes(counts, stage, runtime.data_size, engine.dtype.itemsize),
        ), ""
    finally:
        engine.close()


def _padding_bytes(counts: list[list[int]], stage: int, data_size: int, itemsize: int) -> float:
    """A rank's share of DeepSpeed's padding in weights, gradients and optimizer. Unit: bytes."""
    share = (sum(padded_elements(counts, stage, data_size)) - sum(map(sum, counts))) / data_size
    if stage == 0:
        return 0.0
    # At stage 1 bf16 weights have one fp32 buffer for all gradients of a group; fp32 ones have none.
    gradients = {1: data_size * share * (itemsize < 4), 2: share, 3: share}[stage]
    return 12 * share + 4 * gradients + (itemsize * share if stage == 3 else 0)


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _largest_part(tensors: dict[Coordinate, list[HeldTensor]]) -> Part:
    """The largest slice of the largest matrix."""
    parts = [part for held in tensors.values() for tensor in held for part in tensor.parts]
    return max(parts, key=lambda part: (part.logical.numel, _product(part.shape)))


def memory_problems(one: StartedRank, memory: MemoryPlan) -> list[str]:
    """Where what a rank holds differs from the memory plan of its stage, to the byte, DeepSpeed's padding aside."""
    name = f"rank {one.rank} (tensor {one.tensor_rank}, stage {one.pipeline_rank}, data {one.data_rank})"
    if one.held is None:
        return [f"{name}: the start stopped at {one.stopped}"]
    planned, held, d = memory.stages[one.pipeline_rank], one.held, memory.data_size
    problems = []
    if held.parameters != planned.parameters:
        problems.append(f"{name} has {held.parameters:,} parameters, the memory plan says {planned.parameters:,}")
    # The plan divides by the data-parallel ranks, which leaves fractions of a byte.
    total = held.weights + held.gradients + held.optimizer
    wanted = planned.weights_bytes + planned.gradients_bytes + planned.optimizer_bytes + planned.offloaded_bytes
    if round((wanted + held.padding) * d) != total * d:
        shares = ", ".join(f"{key} {getattr(held, key):,}" for key in ("weights", "gradients", "optimizer"))
        problems.append(
            f"{name} holds {total:,} bytes ({shares}); the memory plan says {wanted:,.0f}, and DeepSpeed's padding is "
            f"{held.padding:,.0f}"
        )
    return problems


def as_json(found: Rehearsal) -> dict[str, Any]:
    """A rehearsal as plain values, units in the names."""
    drawing = found.drawing
    return {
        "world_size": found.world_size,
        "tensor": found.tensor,
        "pipeline": found.pipeline,
        "data": found.data,
        "zero_stage": found.memory.zero_stage,
        "dtype": found.dtype,
        "distinct_ranks": len(found.tensors),
        "tensors": sum(len(held) for held in found.tensors.values()),
        "slices": sum(len(tensor.parts) for held in found.tensors.values() for tensor in held),
        "started": [
            {
                "rank": one.rank,
                "tensor_rank": one.tensor_rank,
                "pipeline_rank": one.pipeline_rank,
                "data_rank": one.data_rank,
                "stopped": one.stopped or None,
                "parameters": one.held and one.held.parameters,
                "weights_bytes": one.held and one.held.weights,
                "gradients_bytes": one.held and one.held.gradients,
                "optimizer_bytes": one.held and one.held.optimizer,
                "padding_bytes": one.held and one.held.padding,
                "planned_bytes": _planned(found.memory, one.pipeline_rank),
            }
            for one in found.started
        ],
        "drawing": drawing
        and {
            "matrix": drawing.name,
            "shape": list(drawing.shape),
            "slice_bytes": drawing.slice_bytes,
            "beyond_bytes": drawing.beyond_bytes,
            "stated_bytes": drawing.stated_bytes,
            "seconds": drawing.seconds,
        },
        "problems": found.problems,
    }


def _planned(memory: MemoryPlan, stage: int) -> dict[str, float]:
    one = memory.stages[stage]
    return {
        "weights": one.weights_bytes,
        "gradients": one.gradients_bytes,
        "optimizer": one.optimizer_bytes,
        "offloaded": one.offloaded_bytes,
    }
