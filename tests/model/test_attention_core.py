"""The backward pass by matrix products against torch's own in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagamma.model import attention_core
from megagamma.model.attention_core import _ProductsBackward, causal_attention, scaled_dot_product


def inputs(length: int, batch: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    # As the fused projection gives them: parts of wider rows.
    wide = torch.randn(length, batch, groups, (heads // groups + 2) * 8, generator=generator).to(dtype)
    query = wide[..., : heads // groups * 8].reshape(length, batch, heads, 8)
    return [x.detach().requires_grad_() for x in (query, wide[..., -16:-8], wide[..., -8:])]


def gradients(out: Tensor, tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
    return [x.double() for x in torch.autograd.grad(out, tensors, weights.to(out.dtype))]


def reference(tensors: list[Tensor], weights: Tensor, scale: float | None) -> list[Tensor]:
    wide = [x.detach().double().requires_grad_() for x in tensors]
    return gradients(scaled_dot_product(*wide, None, scale), wide, weights)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("piece", [1, 1 << 22])
def test_gradients(monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, scale: float | None, piece: int) -> None:
    """Whole, and cut into pieces of one sample. Tolerance: rounding of fp32, and of bf16."""
    monkeypatch.setattr(attention_core, "_PIECE", piece)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        tensors = inputs(40, 3, heads, groups, dtype)
        weights = torch.randn(40, 3, heads * 8, generator=torch.Generator().manual_seed(6)).to(dtype)
        expected = reference(tensors, weights, scale)
        factor = 8**-0.5 if scale is None else scale
        found = gradients(_ProductsBackward.apply(*tensors, factor), tensors, weights)
        assert distance(found, expected) < tolerance
        # Negative control: another scale is seen.
        assert distance(found, reference(tensors, weights, 1.1 * factor)) > 2 * tolerance


def test_chosen_for_short_bf16_on_a_cpu_only() -> None:
    for length, dtype, chosen in (
        (512, torch.bfloat16, True),
        (513, torch.bfloat16, False),
        (512, torch.float32, False),
    ):
        out = causal_attention(*inputs(length, 1, 2, 1, dtype))
        assert (type(out.grad_fn).__name__ == "_ProductsBackwardBackward") == chosen
        expected = scaled_dot_product(*inputs(length, 1, 2, 1, dtype), None, None)
        assert torch.equal(out, expected), "the forward pass is torch's"
