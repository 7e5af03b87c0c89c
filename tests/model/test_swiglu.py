"""The activation's own backward pass against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagamma.model.swiglu import _SwiGLU


def by_autograd(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def states(dtype: torch.dtype) -> Tensor:
    x = 3 * torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(2))
    x[0, 0, :4] = torch.tensor([0.0, -30.0, 30.0, 1e-6])
    return x.to(dtype).requires_grad_()


def test_gradients_in_double_precision() -> None:
    assert torch.autograd.gradcheck(_SwiGLU.apply, states(torch.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_forward_and_gradients_are_autograds(dtype: torch.dtype, tolerance: float, contiguous: bool) -> None:
    x = states(dtype)
    weights = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    if not contiguous:  # as a sum hands it back
        weights = weights.transpose(0, 1).contiguous().transpose(0, 1)
    ours = _SwiGLU.apply(x)
    (gradient,) = torch.autograd.grad(ours, x, weights)
    expected = by_autograd(x)
    (expected_gradient,) = torch.autograd.grad(expected, x, weights)
    assert gradient.dtype == dtype and gradient.shape == x.shape
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)
    # Negative control: the halves are not interchangeable.
    assert (gradient - expected_gradient.roll(8, dims=-1)).abs().max() > 0.1
