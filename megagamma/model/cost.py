"""What a model costs: parameters, FLOPs, bytes per rank, and how well a device is used.

Everything here is arithmetic on the shapes of `megagamma.model.parameters`: no model is built, so that 70
billion parameters cost as little to ask about as one million.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from megagamma.config import ROLES, Config, ModelConfig
from megagamma.model.parameters import logical_parameters

# Roles of the two vocabulary matrices, which scaling laws leave out of "non-embedding" parameters.
VOCABULARY_ROLES = ("embedding", "head")

# Dense (not sparse) 16-bit tensor-core peaks of the vendors' data sheets. Unit: FLOP/s. bf16, but fp16 for
# V100, which has no bf16. The first pattern that the device's name contains wins; a digit after it would be
# another card.
_PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200", 989.4e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("V100", 125e12),
    ("4090", 165e12),
)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights, the padded rows of the vocabulary included."""

    total: int
    embedding: int
    """Token embedding and, untied, output head."""
    non_embedding: int
    """The rest: what scaling laws usually call N."""
    by_role: dict[str, int]
    """Per role of `megagamma.config.ROLES`, and `norm`; roles that the model lacks are left out."""


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Count the weights of a model without building it.

    Args:
        model: resolved, vocabulary known.
    """
    found = dict.fromkeys((*ROLES, "norm"), 0)
    for logical in logical_parameters(model):
        found[logical.role] += logical.numel
    by_role = {role: count for role, count in found.items() if count}
    total = sum(by_role.values())
    embedding = sum(by_role.get(role, 0) for role in VOCABULARY_ROLES)
    return ParameterCounts(total, embedding, total - embedding, by_role)


def tokens_for_budget(parameters: int, tokens_per_parameter: float = 20.0) -> int:
    """Training tokens for a model of that many parameters. Unit: tokens.

    20 tokens per parameter are about compute-optimal (arXiv 2203.15556) [REF].
    """
    return round(parameters * tokens_per_parameter)


def forward_flops_per_token(model: ModelConfig, sequence_length: int, causal: bool = True) -> float:
    """Floating-point operations of one token's forward pass: a third of `flops_per_token`.

    Each multiply-add counts as two operations. A weight of a matrix is used once per token (2 FLOPs); the
    embedding is looked up, not multiplied, while the head is multiplied even if it is tied. Attention adds Q
    K^T and A V, each 2 * heads * head_dim FLOPs per pair of positions: 4 * L * heads * head_dim * s per token
    for s positions, halved when the mask is causal. Norms, RoPE, softmax, SiLU and the gate's product are
    left out, as is usual.

    Unit: FLOPs per token, averaged over a sequence of `sequence_length` tokens.
    """
    counts = parameter_counts(model)
    matrices = counts.total - counts.embedding - counts.by_role["norm"]
    head = counts.by_role["embedding"]  # the head has the embedding's shape, tied or not
    assert model.head_dim is not None
    scores = 4.0 * model.num_layers * model.num_attention_heads * model.head_dim * sequence_length
    return 2.0 * (matrices + head) + scores * (0.5 if causal else 1.0)


def flops_per_token(model: ModelConfig, sequence_length: int, causal: bool = True) -> float:
    """Floating-point operations of one token's training step, without recomputation.

    6 * matmul parameters + 12 * L * heads * head_dim * s / 2: the rule of PaLM, appendix B (arXiv
    2204.02311), with the causal half of the scores, head included and embedding look-up not. The backward
    pass costs twice the forward.

    Args:
        model: resolved, vocabulary known.
        sequence_length: unit: tokens.
        causal: count only the scores below the diagonal; False gives PaLM's number.

    Returns:
        Unit: FLOPs per token.
    """
    return 3.0 * forward_flops_per_token(model, sequence_length, causal)


def known_peak_flops(device_name: str) -> float | None:
    """Dense 16-bit peak of a GPU by the name that its driver gives. Unit: FLOP/s; None when unknown."""
    name = device_name.upper()
    for pattern, peak in _PEAKS:
        if re.search(rf"(?<![0-9]){pattern}(?![0-9])", name):
            return peak
    return None


def model_flops_utilization(flops_per_second: float, peak_flops: float | None, devices: int = 1) -> float | None:
    """Share of the devices' peak that a run's model FLOPs make up (MFU, PaLM appendix B).

    Args:
        flops_per_second: `flops_per_token` times tokens per second, over all devices.
        peak_flops: of one device, from `known_peak_flops` or `measure_matmul_peak`.
        devices: number of devices.

    Returns:
        0 to 1; None when the peak is not known.
    """
    if peak_flops is None or not peak_flops > 0:
        return None
    return flops_per_second / (peak_flops * devices)


def measure_matmul_peak(dtype: torch.dtype = torch.float32, threads: int = 0, seconds: float = 0.4) -> float:
    """Best rate of a square matrix product on this CPU, as the reference that a GPU's data sheet gives.

    Args:
        dtype: of the factors.
        threads: torch's threads during the measurement; 0 leaves them as they are.
        seconds: time to spend. Slow machines stop at the smaller sizes (512, 1024, 2048).

    Returns:
        Unit: FLOP/s, of this process.
    """
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        best, end = 0.0, time.perf_counter() + seconds
        for size in (512, 1024, 2048):
            if best and time.perf_counter() + 2 * (2.0 * size**3) / best > end:
                break
            factor = torch.ones(size, size, dtype=dtype)
            out = torch.empty_like(factor)
            # Each size gets a share of the time; its first product warms up caches and kernels.
            until = min(end, time.perf_counter() + seconds / 3)
            for _ in range(50):
                begin = time.perf_counter()
                torch.mm(factor, factor, out=out)
                now = time.perf_counter()
                best = max(best, 2.0 * size**3 / (now - begin))
                if now > until:
                    break
        return best
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class RankBytes:
    """Memory of the rank with the most of it. Unit: bytes, but for `pipeline_stage` and `parameters`."""

    pipeline_stage: int
    parameters: int
    """Weights of its tensor-parallel and pipeline shard, before ZeRO."""
    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    """fp32 master weights, where they are kept, and Adam's two fp32 moments."""
    activations_bytes: float
    offloaded_bytes: float
    """Part of the above that lies in the host's memory."""

    @property
    def device_bytes(self) -> float:
        """What the device itself must hold."""
        kept = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes
        return kept - self.offloaded_bytes


def stage_parameters(config: Config) -> list[int]:
    """Weights of one rank of each pipeline stage, before ZeRO.

    The first stage has the embedding, the last the final norm and the head; a tied embedding is on both.
    """
    model, t, p = config.model, config.parallel.tensor, config.parallel.pipeline
    layers, embedding, last = 0, 0, 0
    for logical in logical_parameters(model):
        count = logical.numel // (1 if logical.split_axis is None else t)
        if logical.name.startswith("model.layers."):
            layers += count
        elif logical.role == "embedding":
            embedding = count
        else:
            last += count
    if model.tie_embeddings and p > 1:
        last += embedding
    stages = [layers // p] * p
    stages[0] += embedding
    stages[-1] += last
    return stages


def layer_activation_bytes(config: Config, dtype_bytes: int) -> float:
    """Activations that one layer keeps for one microbatch's backward pass, on one rank, none recomputed.

    After Korthikanti et al. (arXiv 2205.05198), whose layer keeps s b h (34 + 5 a s / h) bytes, counted anew
    for this model's layer: no dropout, no score matrix (flash attention), SwiGLU, gate, grouped queries. Per
    token, in elements, with t tensor-parallel ranks, q = heads x head_dim, k = groups x head_dim and
    f = ffn_hidden_size:

    - 4h: input and output of the two norms; not divided by t, except under sequence parallelism;
    - (q + 2k + q + k + q) / t: fused projection, q and k after RoPE, attention's output;
    - q/k-norm: (q + k) / t;
    - an elementwise gate: 3q / t (gate, its sigmoid, the product), and in bf16 4 bytes x q / t for the fp32
      sigmoid; a headwise gate: q / t (the product);
    - 3f / t: fc1's output (2f) and the SwiGLU's (f), which keeps no steps between them;
    - 4 bytes per head / t for the softmax's log-sum-exp.

    An estimate for fused norms, as on a GPU. On a CPU, where norms keep one fp32 tensor more or two, it lies
    11 to 15 % below what autograd was seen to keep in fp32, and about 30 % below in bf16. Unit: bytes.
    """
    model, t = config.model, config.parallel.tensor
    assert model.head_dim is not None
    assert model.num_query_groups is not None
    assert model.ffn_hidden_size is not None
    q, k = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    split = 3.0 * q + 3.0 * k + 3.0 * model.ffn_hidden_size
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
    return per_token * config.data.sequence_length * config.data.micro_batch_size


def stage_activation_bytes(config: Config, stage: int, data_size: int, dtype_bytes: int) -> float:
    """Activations of one rank of a pipeline stage at their peak. Unit: bytes.

    Stage i of p holds the activations of p - i microbatches (1F1B schedule), but no more than there are; with
    v virtual stages, of ((p - i - 1) * 2 + (v - 1) * p + 1) / v. With full recomputation a layer keeps its
    input only (2 s b h bytes in bf16), and one layer at a time is whole. The last stage adds the head: its
    input and, for every token of one microbatch, logits and their fp32 log-probabilities, (dtype + 4 bytes) x
    padded vocabulary / t.
    """
    model, parallel, data = config.model, config.parallel, config.data
    p, v = parallel.pipeline, parallel.virtual_pipeline or 1
    tokens = data.sequence_length * data.micro_batch_size
    microbatches = max(1, data.global_batch_size // (data.micro_batch_size * data_size))
    in_flight = float(p - stage) if v == 1 else ((p - stage - 1) * 2 + (v - 1) * p + 1) / v
    layers = model.num_layers / p * min(in_flight, microbatches)
    hidden = tokens * model.hidden_size * dtype_bytes / (parallel.tensor if parallel.sequence else 1)
    whole_layer = layer_activation_bytes(config, dtype_bytes)
    found = hidden * layers + whole_layer if model.recompute == "full" else whole_layer * layers
    if stage == p - 1:
        rows = parameter_counts(model).by_role["embedding"] // model.hidden_size
        found += 2.0 * hidden + tokens * rows * (dtype_bytes + 4.0) / parallel.tensor
    return found


def bytes_per_rank(
    config: Config,
    data_size: int,
    zero_stage: int,
    dtype_bytes: int,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> RankBytes:
    """Memory of the rank that needs the most, by pipeline stage.

    With n weights on the rank's shard, e bytes each, and d data-parallel ranks (ZeRO: arXiv 1910.02054):

    - weights: e n, at stage 3 over d;
    - gradients: 4 n, since they are accumulated in fp32, from stage 2 on over d;
    - optimizer: 8 n for Adam's moments, and 4 n for master weights, which DeepSpeed keeps apart at stages 1
      and 2 always, at stage 3 when the weights are bf16, and at stage 0 never; from stage 1 on over d.

    Left out: communication buckets, layers gathered for a moment at stage 3, the allocator's fragmentation,
    and the 1 to 2 GB that CUDA and NCCL take for themselves.

    Args:
        config: resolved, vocabulary known; gives the shape, the layout, the batch and the recomputation.
        data_size: data-parallel ranks d.
        zero_stage: 0 to 3.
        dtype_bytes: bytes per weight and activation: 2 for bf16, 4 for fp32.
        offload_optimizer: the optimizer's state (and at stage 2 and 3 the gradients it reads) lies on the
        host.
        offload_parameters: at stage 3, weights lie on the host.
    """
    master = 4 if zero_stage in (1, 2) or (zero_stage == 3 and dtype_bytes < 4) else 0
    candidates = []
    for stage, count in enumerate(stage_parameters(config)):
        weights = count * dtype_bytes / (data_size if zero_stage >= 3 else 1)
        gradients = count * 4.0 / (data_size if zero_stage >= 2 else 1)
        optimizer = count * (8.0 + master) / (data_size if zero_stage >= 1 else 1)
        offloaded = 0.0
        if offload_optimizer:
            offloaded += optimizer + (gradients if zero_stage >= 2 else 0.0)
        if offload_parameters and zero_stage == 3:
            offloaded += weights
        activations = stage_activation_bytes(config, stage, data_size, dtype_bytes)
        candidates.append(RankBytes(stage, count, weights, gradients, optimizer, activations, offloaded))
    return max(candidates, key=lambda rank: rank.device_bytes)
