"""RMSNorm with fp32 statistics and an epsilon that is really used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagamma.model.regions import Region
from megagamma.model.rotary import rotate, rotated


class _RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm with a backward pass of its own; torch's has no fused kernel on a CPU and makes twice the passes.

    With r = 1 / sqrt(mean(x^2) + epsilon), n = x r and g = dy w: dx = r (g - n mean(g n)), dw = sum(dy n).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = rms.add_(epsilon).rsqrt_()
        normed = wide * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return (normed * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, inverse, weight = ctx.saved_tensors
        output = gradients[0].float()
        per_weight = output * normed
        to_weight = per_weight.flatten(0, -2).sum(0)
        mean = (per_weight @ weight.float()).unsqueeze(-1).div_(weight.numel())
        to_x = (output * weight.float()).addcmul_(normed, mean, value=-1).mul_(inverse)
        return to_x.to(gradients[0].dtype), to_weight.to(weight.dtype), None


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * inverse * weight.float()).to(x.dtype)


def _eager(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if x.device.type == "cpu":
        return _RMSNormOnCPU.apply(x, weight, epsilon)  # type: ignore[no-any-return, no-untyped-call]
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)


NORM = Region(_eager, _normed)
NORM_AND_ROTATE = Region(
    lambda x, weight, epsilon, table: rotate(_eager(x, weight, epsilon), table),
    lambda x, weight, epsilon, table: rotated(_normed(x, weight, epsilon), table),
)


class RMSNorm(torch.nn.Module):
    """y = weight * x / sqrt(mean(x^2) + epsilon), over the last axis.

    The mean square, the sum with epsilon and the root are computed in fp32 whatever the dtype of x, so that an
    epsilon of 1e-12, which is lost beside a bf16 number, keeps its meaning. `torch.nn.functional.rms_norm`, which
    serves GPUs, does so in its fused and in its composite form.

    Built by Megatron's layer spec, which passes (config, hidden_size, eps).
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-12, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Under sequence parallelism each tensor-parallel rank norms other tokens: the gradients must be summed.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """Norm, and rotate when there is a table (see `rotate`).

        Args:
            x: [..., hidden_size], any float dtype; returns the same shape and dtype.
        """
        y: Tensor = (
            NORM(x, self.weight, self.eps) if table is None else NORM_AND_ROTATE(x, self.weight, self.eps, table)
        )
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps:g}"
