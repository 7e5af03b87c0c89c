"""What a model costs: parameters and FLOPs, and how well a device is used. Its memory: `megagamma.planning.memory`.

Everything here is arithmetic on the shapes of `megagamma.model.parameters`: no model is built, so that 70
billion parameters cost as little to ask about as one million.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagamma.config.schema import ROLES, ModelConfig
from megagamma.model.parameters import logical_parameters

if TYPE_CHECKING:
    import torch

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
KNOWN_DEVICES = tuple(name for name, _ in _PEAKS)
"""GPUs whose peak is known, see `known_peak_flops`."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights, the padded rows of the vocabulary included."""

    total: int
    embedding: int
    """Token embedding and, untied, output head."""
    non_embedding: int
    """The rest: what scaling laws usually call N."""
    by_role: dict[str, int]
    """Per role of `megagamma.config.schema.ROLES`, and `norm`; roles that the model lacks are left out."""


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


def measure_matmul_peak(dtype: torch.dtype | None = None, threads: int = 0, seconds: float = 0.4) -> float:
    """Best rate of a square matrix product on this CPU, as the reference that a GPU's data sheet gives.

    Args:
        dtype: of the factors; default: fp32.
        threads: torch's threads during the measurement; 0 leaves them as they are.
        seconds: time to spend. Slow machines stop at the smaller sizes (512, 1024, 2048).

    Returns:
        Unit: FLOP/s, of this process.
    """
    import torch

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
