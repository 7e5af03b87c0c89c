"""SwiGLU on the fused [gate | up] tensor, with a backward pass that writes both gradients in place."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from megagamma.model.regions import Region


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, whose gradients for both halves go into one tensor, without a concatenation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        active = torch.nn.functional.silu(gate)
        ctx.save_for_backward(x, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x, active), (output,) = ctx.saved_tensors, gradients
        gate, up = x.chunk(2, dim=-1)
        gradient = torch.empty_like(x)
        to_gate, to_up = gradient.chunk(2, dim=-1)
        torch.mul(output, active, out=to_up)
        torch.ops.aten.silu_backward.grad_input(output * up, gate, grad_input=to_gate)
        return gradient


def _formula(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


SWIGLU = Region(_SwiGLU.apply, _formula)


class SwiGLUMLP(MLP):
    """Megatron's MLP of two parallel linear layers, with the gated activation between them replaced."""

    def __init__(self, config: Any, tp_group: Any = None, pg_collection: Any = None, **_: Any) -> None:
        layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        # Newer Megatron-core hands every module its whole collection of groups.
        super().__init__(config, layers, tp_group=tp_group if pg_collection is None else pg_collection.tp)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, hidden_size] -> ([s, b, hidden_size], None); there are no biases."""
        fused, _bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(SWIGLU(fused))
