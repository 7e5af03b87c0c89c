"""Memory of a run's ranks before it is launched: what each pipeline stage needs, and the nearest layout that fits.

Arithmetic on shapes, calibrated on real training steps (docs/memory.md, `tests/planning/test_memory.py`): of 30 million
weights in fp32 on a CPU, one rank and two, the planned peak was 2 % below the measured one under ZeRO 0 to 2 and 4 %
below under ZeRO 3. GPUs, bf16, tensor and pipeline parallelism follow from the same formulas and have not been measured.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megagamma.config.deepspeed import deepspeed_values, zero_stage
from megagamma.config.resolve import planned_dtype, validate
from megagamma.config.rules import data_parallel_size
from megagamma.config.schema import Config, padded_vocab_size
from megagamma.errors import ConfigurationError
from megagamma.model.parameters import layer_parameters, outer_parameters

GIB = 2**30
# What a process holds before a model is built. CPU: resident after importing torch, Megatron-core and DeepSpeed
# (measured). GPU: CUDA's context, NCCL's buffers and the math libraries' workspaces [practice].
OVERHEAD_BYTES = {"cpu": 0.4 * GIB, "cuda": 1.5 * GIB}
# DeepSpeed's defaults. Unit: elements.
_BUCKET, _LIVE = 5e8, 1e9
_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class StageMemory:
    """Memory of one rank of a pipeline stage, on its device. Unit: bytes, but for the first two.

    Two moments can be the fullest: the top of the last microbatch's backward pass, where activations and logits are
    alive, and the reduction and update, where all gradients are.
    """

    pipeline_stage: int
    parameters: int
    """Weights of its tensor-parallel and pipeline shard, before ZeRO."""
    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    """fp32 master weights, where they are kept, and Adam's two fp32 moments."""
    activations_bytes: float
    logits_bytes: float
    """Logits, their log-probabilities and gradients; 0 on all but the last stage."""
    buffers_bytes: float
    """DeepSpeed's, which stand all through a step: reduction bucket, weights gathered under ZeRO 3."""
    update_bytes: float
    """Copies of gradients during reduction and update."""
    overhead_bytes: float
    offloaded_bytes: float
    """What lies in the host's memory instead, counted nowhere else."""
    accumulates: bool
    """Whether there are several microbatches, so that gradients are there when activations are."""

    def items(self) -> dict[str, float]:
        """What makes up `device_bytes`, by name, at the fuller of the two moments. Unit: bytes."""
        backward = {"activations": self.activations_bytes, "logits": self.logits_bytes}
        if self.accumulates:
            backward["gradients"] = self.gradients_bytes
        update = {"gradients": self.gradients_bytes, "update": self.update_bytes}
        fuller = backward if sum(backward.values()) >= sum(update.values()) else update
        standing = {"weights": self.weights_bytes, "optimizer": self.optimizer_bytes}
        return {**standing, **fuller, "buffers": self.buffers_bytes, "overhead": self.overhead_bytes}

    @property
    def device_bytes(self) -> float:
        """What the device itself must hold."""
        return sum(self.items().values())


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run's ranks, by pipeline stage."""

    stages: list[StageMemory]
    data_size: int
    zero_stage: int
    dtype: str

    @property
    def worst(self) -> StageMemory:
        """The stage whose ranks need the most."""
        return max(self.stages, key=lambda stage: stage.device_bytes)


def stage_parameters(config: Config) -> list[int]:
    """Weights of one rank of each pipeline stage, before ZeRO.

    The first stage has the embedding, the last the final norm and the head; a tied embedding is on both.
    """
    model, t, p = config.model, config.parallel.tensor, config.parallel.pipeline

    def count(parameters: Any) -> int:
        return sum(logical.numel // (1 if logical.split_axis is None else t) for logical in parameters)

    outer = outer_parameters(model)
    embedding = outer.pop("embedding")
    last = count(outer.values()) + (count([embedding]) if model.tie_embeddings and p > 1 else 0)
    stages = [count(layer_parameters(model, 0).values()) * model.num_layers // p] * p
    stages[0] += count([embedding])
    stages[-1] += last
    return stages


def _tokens(config: Config) -> int:
    return config.data.sequence_length * config.data.micro_batch_size


def layer_activation_bytes(config: Config, dtype_bytes: int) -> float:
    """Activations that one layer keeps for one microbatch's backward pass, on one rank, none recomputed.

    After Korthikanti et al. (arXiv 2205.05198), whose layer keeps s b h (34 + 5 a s / h) bytes, counted anew
    for this model's layer: no dropout, no score matrix (flash attention), SwiGLU, gate, grouped queries. Per
    token, in elements, with t tensor-parallel ranks, q = heads x head_dim, k = groups x head_dim and
    f = ffn_hidden_size:

    - 4h: two tensors of each of the two norms; not divided by t, except under sequence parallelism;
    - (q + 2k + q + k + q) / t: fused projection, q and k after RoPE, attention's output;
    - q/k-norm: (q + k) / t;
    - an elementwise gate: 3q / t (gate, its sigmoid, the product), and in bf16 4 bytes x q / t for the fp32
      sigmoid; a headwise gate: q / t (the product);
    - 4f / t: fc1's output (2f), the gate's SiLU (f) and the SwiGLU's output (f);
    - 4 bytes per head / t for the softmax's log-sum-exp.

    In fp32 on a CPU within 5 % of what autograd was seen to keep. In bf16 a CPU's norms keep an fp32 tensor, which
    is not counted. Unit: bytes.
    """
    model, t = config.model, config.parallel.tensor
    assert model.head_dim is not None
    assert model.num_query_groups is not None
    assert model.ffn_hidden_size is not None
    q, k = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    split = 3.0 * q + 3.0 * k + 4.0 * model.ffn_hidden_size
    if model.qk_norm:
        split += q + k
    split += {"none": 0.0, "elementwise": 3.0, "headwise": 1.0}[model.attention_gate] * q
    whole = 4.0 * model.hidden_size / (t if config.parallel.sequence else 1)
    per_token = (whole + split / t) * dtype_bytes
    if model.attention_gate == "elementwise" and dtype_bytes < 4:
        per_token += 4.0 * q / t
    if model.recompute != "selective":
        # Selective recomputation redoes the attention core, whose scores flash attention never keeps.
        per_token += 4.0 * model.num_attention_heads / t
    return per_token * _tokens(config)


def microbatches(config: Config, data_size: int) -> int:
    """Microbatches of a rank in one step, at the full global batch."""
    return max(1, config.data.global_batch_size // (config.data.micro_batch_size * data_size))


def _hidden_bytes(config: Config, dtype_bytes: int) -> float:
    parallel = config.parallel
    return _tokens(config) * config.model.hidden_size * dtype_bytes / (parallel.tensor if parallel.sequence else 1)


def stage_activation_bytes(config: Config, stage: int, data_size: int, dtype_bytes: int) -> float:
    """Activations that one rank of a pipeline stage keeps at the peak, without the logits. Unit: bytes.

    Stage i of p holds the activations of p - i microbatches (1F1B schedule), but no more than there are; with
    v virtual stages, of ((p - i - 1) * 2 + (v - 1) * p + 1) / v. With full recomputation a layer keeps its
    input only (2 s b h bytes in bf16). The last stage adds the final norm's two tensors.
    """
    model, p, v = config.model, config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    in_flight = float(p - stage) if v == 1 else ((p - stage - 1) * 2 + (v - 1) * p + 1) / v
    layers = model.num_layers / p * min(in_flight, microbatches(config, data_size))
    hidden = _hidden_bytes(config, dtype_bytes)
    kept = hidden if model.recompute == "full" else layer_activation_bytes(config, dtype_bytes)
    return kept * layers + (2.0 * hidden if stage == p - 1 else 0.0)


def logits_bytes(config: Config, dtype_bytes: int) -> float:
    """The loss of one microbatch at its fullest, on a rank of the last stage. Unit: bytes.

    On one tensor-parallel rank the logits, which their gradient overwrites (`megagamma.model.cross_entropy`). Between
    tensor-parallel ranks Megatron's loss: logits, fp32 copy, and masked copy.
    """
    t = config.parallel.tensor
    return _tokens(config) * padded_vocab_size(config.model) / t * (dtype_bytes if t == 1 else dtype_bytes + 8.0)


def _working_bytes(config: Config, dtype_bytes: int) -> float:
    """Gradients of activations while one layer goes backward, and the layer itself when it is recomputed."""
    model, t = config.model, config.parallel.tensor
    assert model.ffn_hidden_size is not None
    gradients = _tokens(config) * 4.0 * model.ffn_hidden_size / t * dtype_bytes + _hidden_bytes(config, dtype_bytes)
    return gradients + (layer_activation_bytes(config, dtype_bytes) if model.recompute == "full" else 0.0)


def stage_memory(
    config: Config, stage: int, data_size: int, dtype_bytes: int, values: dict[str, Any], device: str = "cuda"
) -> StageMemory:
    """Memory of a rank of one pipeline stage.

    With n weights on the rank's shard, e bytes each, and d data-parallel ranks (ZeRO: arXiv 1910.02054):

    - weights: e n, at stage 3 over d;
    - gradients: 4 n, since they are accumulated in fp32, from stage 2 on over d;
    - optimizer: 8 n for Adam's moments, and from stage 1 on 4 n for master weights, which DeepSpeed keeps apart even
      when the weights are fp32; from stage 1 on over d;
    - buffers: the bucket that gradients are reduced in, reduce_bucket_size x e, twice with overlap_comm. A GPU's
      allocator takes it whole. On a CPU only what is written of it exists: at stage 1 gradients move into it, at stage 2
      it is filled when activations are gone, at stage 3 it stays. Stage 3 also keeps gathered weights, up to
      stage3_max_live_parameters;
    - update: at stage 0 with d > 1 and in bf16 at stage 1, gradients flattened for the reduction, up to 5e8 elements;
      else this rank's share of them flattened, 4 n / d.

    Left out: fragmentation, and on a CPU what glibc keeps of freed memory (docs/memory.md).

    Args:
        config: resolved, vocabulary known; gives the shape, the layout, the batch and the recomputation.
        stage: of the pipeline.
        data_size: data-parallel ranks d.
        dtype_bytes: bytes per weight and activation: 2 for bf16, 4 for fp32.
        values: DeepSpeed's JSON.
        device: cpu or cuda.
    """
    zero, section = zero_stage(values), values.get("zero_optimization", {})

    def number(key: str, default: float) -> float:
        value = section.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"deepspeed_config: zero_optimization.{key}={value!r} must be a number")
        return float(value)

    def on_host(key: str) -> bool:
        return (section.get(key) or {}).get("device", "none") != "none"

    n = stage_parameters(config)[stage]
    shard = n / data_size
    host_optimizer = on_host("offload_optimizer") and zero > 0
    host_weights = on_host("offload_param") and zero == 3
    weights = (shard if zero == 3 else n) * dtype_bytes
    gradients = (shard if zero >= 2 else n) * 4.0
    optimizer = shard * 12.0 if zero else n * 8.0
    flattens = (zero == 0 and data_size > 1) or (zero == 1 and dtype_bytes < 4)
    update = min(n, _BUCKET) * 4.0 if flattens else shard * 4.0 if zero else 0.0
    buffers = 0.0
    if zero >= 2 or (zero == 1 and not flattens):
        bucket = number("reduce_bucket_size", _BUCKET) * (1 + bool(section.get("overlap_comm", zero == 3)))
        if device == "cuda":
            buffers = bucket * dtype_bytes
        elif zero == 3:
            buffers = min(bucket, n) * dtype_bytes
        elif zero == 2:
            update = max(update, min(bucket, n) * dtype_bytes)
    if zero == 3 and data_size > 1:
        buffers += min(n, number("stage3_max_live_parameters", _LIVE)) * dtype_bytes
    offloaded = 0.0
    if host_optimizer:
        offloaded, optimizer, update = optimizer, 0.0, 0.0
        if zero >= 2:
            offloaded, gradients = offloaded + gradients, 0.0
    if host_weights:
        offloaded, weights = offloaded + weights, 0.0
    logits = logits_bytes(config, dtype_bytes) if stage == config.parallel.pipeline - 1 else 0.0
    activations = stage_activation_bytes(config, stage, data_size, dtype_bytes)
    # A layer goes backward after the logits are gone.
    activations += max(0.0, _working_bytes(config, dtype_bytes) - logits)
    return StageMemory(
        stage, n, weights, gradients, optimizer, activations, logits, buffers, update, OVERHEAD_BYTES[device],
        offloaded, accumulates=microbatches(config, data_size) > 1,
    )  # fmt: skip


def plan(config: Config, world_size: int) -> MemoryPlan:
    """What every rank of a run will need. The device is taken as a GPU, where memory is short, unless run.device is cpu.

    Args:
        config: resolved and validated for `world_size`, vocabulary known.
        world_size: number of processes.
    """
    data_size = data_parallel_size(config, world_size)
    device: Literal["cpu", "cuda"] = "cpu" if config.run.device == "cpu" else "cuda"
    dtype = planned_dtype(config, data_size, device)
    values = deepspeed_values(config, data_size, dtype == "bf16")
    dtype_bytes = 2 if dtype == "bf16" else 4
    stages = [
        stage_memory(config, stage, data_size, dtype_bytes, values, device) for stage in range(config.parallel.pipeline)
    ]
    return MemoryPlan(stages, data_size, zero_stage(values), dtype)


def _choices(config: Config, world_size: int, zero: int) -> Iterator[dict[str, Any]]:
    """Changes of options that save memory, fewest first, then in the order of the list below."""
    parallel, micro = config.parallel, config.data.micro_batch_size
    options: list[tuple[str, list[Any]]] = [
        ("data.micro_batch_size", [size for size in range(micro - 1, 0, -1) if micro % size == 0]),
        ("model.recompute", list(_RECOMPUTE[_RECOMPUTE.index(config.model.recompute) + 1 :])),
        ("deepspeed_config", [f"configs/deepspeed/zero{stage}.json" for stage in range(zero + 1, 4)]),
        ("parallel.tensor", [t for t in range(parallel.tensor + 1, world_size + 1) if world_size % t == 0]),
        ("parallel.pipeline", [p for p in range(parallel.pipeline + 1, world_size + 1) if world_size % p == 0]),
    ]
    for number in range(1, len(options) + 1):
        for chosen in itertools.combinations(options, number):
            for values in itertools.product(*(choices for _, choices in chosen)):
                yield dict(zip((name for name, _ in chosen), values, strict=True))


def nearest_fit(config: Config, world_size: int) -> tuple[dict[str, Any], float] | None:
    """The smallest change of options with which a run fits in parallel.memory_gib.

    Of changes of equally many options the first is taken in this order: smaller micro batch, recomputation, higher ZeRO
    stage, more tensor-parallel ranks, more pipeline stages. Only what `validate` allows is looked at.

    Returns:
        The options with their values, and what the fullest rank then needs (unit: bytes); None when nothing fits.
    """
    limit = config.parallel.memory_gib
    assert limit is not None
    for changes in _choices(config, world_size, plan(config, world_size).zero_stage):
        other = copy.deepcopy(config)
        for name, value in changes.items():
            section, _, key = name.rpartition(".")
            setattr(getattr(other, section) if section else other, key, value)
        try:
            validate(other, world_size)
        except ConfigurationError:
            continue
        needed = plan(other, world_size).worst.device_bytes
        if needed <= limit * GIB:
            return changes, needed
    return None


def check_fits(config: Config, world_size: int) -> None:
    """Refuse a run that cannot fit in parallel.memory_gib; does nothing where that is not set.

    While the vocabulary is not known it is taken as the smallest there is, so that a refusal is right all the same.

    Args:
        config: resolved; its other rules hold for `world_size`.
        world_size: number of processes.

    Raises:
        ConfigurationError: with what is needed, the largest item, and the nearest choice that fits.
    """
    limit = config.parallel.memory_gib
    if limit is None:
        return
    if config.model.vocab_size is None:
        config = copy.deepcopy(config)
        config.model.vocab_size = 2
    worst = plan(config, world_size).worst
    if worst.device_bytes <= limit * GIB:
        return
    items = worst.items()
    largest = max(items, key=lambda name: items[name])
    found = nearest_fit(config, world_size)
    if found is None:
        advice = (
            f"no micro batch, recomputation, ZeRO stage, tensor or pipeline degree fits on {world_size} processes: start "
            "more of them, offload as configs/deepspeed/zero3_offload.json does, or train a smaller model"
        )
    else:
        changes = " ".join(f"--{name} {value}" for name, value in found[0].items())
        advice = f"use {changes}, which needs {found[1] / GIB:.2f} GiB"
    raise ConfigurationError(
        f"parallel.memory_gib={limit:g}: a rank of pipeline stage {worst.pipeline_stage} needs "
        f"{worst.device_bytes / GIB:.2f} GiB, most of it {largest} ({items[largest] / GIB:.2f} GiB): {advice}"
    )
