"""The loss in pieces against torch's in float64, at small and at real vocabularies, with padding, in fp32 and bf16."""

import pytest
import torch
from torch import Tensor

from megagamma.model.cross_entropy import CPU_PIECE, cross_entropy


def exact(logits: Tensor, labels: Tensor, weights: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Losses, and gradient of their weighted sum, in float64."""
    x = logits.detach().double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(x[:, :vocab_size], labels, reduction="none")
    (losses * weights).sum().backward()
    return losses.detach(), x.grad


def ours(logits: Tensor, labels: Tensor, weights: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf * 1, labels, vocab_size)
    (losses * weights).sum().backward()
    return losses.detach(), leaf.grad


@pytest.mark.parametrize(
    ("rows", "vocab_size", "padded"),
    [(7, 2, 2), (300, 512, 640), (200, 50_000, 50_048), (2, CPU_PIECE + 5, CPU_PIECE + 5)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_equals_torch(rows: int, vocab_size: int, padded: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    # With outliers as large as logits get, and weights that are 0 for tokens that do not count.
    logits = (torch.randn(rows, padded) * 4).index_fill(0, torch.tensor([1]), 60.0).to(dtype)
    labels = torch.randint(vocab_size, (rows,))
    weights = torch.rand(rows).mul(2).index_fill(0, torch.tensor([0]), 0.0)
    expected, gradient = exact(logits, labels, weights, vocab_size)
    found, found_gradient = ours(logits, labels, weights, vocab_size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found_gradient.double(), gradient, rtol=tolerance, atol=tolerance * 1e-2)
    assert not found_gradient[0].any() and not found_gradient[:, vocab_size:].any()
    if padded > vocab_size:  # a negative control: the padding would be seen
        wrong, _ = exact(logits, labels, weights, padded)
        assert (found.double() - wrong).abs().max() > 1e-3


def test_logits_are_overwritten_once() -> None:
    """The gradient lies where the logits were, so that a second backward pass is an error and never a wrong number."""
    leaf = torch.randn(6, 10, requires_grad=True)
    logits = leaf * 1
    loss = cross_entropy(logits, torch.arange(6), 10).sum()
    place = logits.data_ptr()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == place
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_nothing_is_written_without_a_backward_pass() -> None:
    logits = torch.randn(6, 10)
    before = logits.clone()
    with torch.no_grad():
        cross_entropy(logits, torch.arange(6), 10)
    assert torch.equal(logits, before)
