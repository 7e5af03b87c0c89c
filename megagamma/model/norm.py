"""RMSNorm with fp32 statistics and an epsilon that is really used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """y = weight * x / sqrt(mean(x^2) + epsilon), over the last axis.

    The mean square, the sum with epsilon and the root are computed in fp32 whatever the dtype of x, so that an
    epsilon of 1e-12, which is lost beside a bf16 number, keeps its meaning. `torch.nn.functional.rms_norm`
    does so in its fused and in its composite form.

    Built by Megatron's layer spec, which passes (config, hidden_size, eps).
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-12, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Under sequence parallelism each tensor-parallel rank norms other tokens: the gradients must be summed.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size], any float dtype; returns the same shape and dtype."""
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps:g}"
