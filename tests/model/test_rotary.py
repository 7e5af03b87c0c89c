"""The rotation against a plain multiplication of complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagamma.model.rotary import RotaryTable, rotate

HEAD_DIM, THETA = 12, 500.0


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """x [s, b, heads, head_dim], its halves read as real and imaginary parts; positions [b, s]."""
    half = x.shape[-1] // 2
    frequencies = THETA ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    angles = positions.t()[:, :, None, None].double() * frequencies
    product = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((product.real, product.imag), dim=-1)


def table_of(positions: Tensor, consecutive: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    table = RotaryTable(HEAD_DIM, THETA, dtype)
    table.set_positions(positions, consecutive)
    return table()


def random_states(length: int, rows: int) -> Tensor:
    return torch.randn(length, rows, 3, HEAD_DIM, generator=torch.Generator().manual_seed(length))


CONSECUTIVE = torch.arange(7).repeat(2, 1)
# Two rows that begin again at different places, and one with gaps.
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 0, 1], [5, 900, 3, 3, 70, 1, 0]])


@pytest.mark.parametrize(("positions", "consecutive"), [(CONSECUTIVE, True), (CONSECUTIVE, False), (POSITIONS, False)])
def test_rotation_is_a_complex_product(positions: Tensor, consecutive: bool) -> None:
    x = random_states(7, len(positions)).requires_grad_()
    rotated = rotate(x, table_of(positions, consecutive))
    assert rotated.dtype == torch.float32 and rotated.is_contiguous()
    torch.testing.assert_close(rotated.double(), turned(x, positions), rtol=0, atol=2e-4)
    # Lengths stay.
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)
    # Negative control: other positions give something else.
    assert (rotated.double() - turned(x, positions + 1)).abs().max() > 0.1


def test_gradient_is_that_of_the_complex_product() -> None:
    x = random_states(7, 3).requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad((rotate(x, table_of(POSITIONS, False)) * weights).sum(), x)
    (expected,) = torch.autograd.grad((turned(x, POSITIONS) * weights).sum(), x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)


def test_a_product_of_query_and_key_depends_on_their_distance_alone() -> None:
    query, key = random_states(7, 1), random_states(9, 1)[:7]

    def scores(shift: int) -> Tensor:
        table = table_of(torch.arange(7).unsqueeze(0) + shift, False)
        q, k = rotate(query, table)[:, 0, 0], rotate(key, table)[:, 0, 0]
        return q @ k.t()

    torch.testing.assert_close(scores(0), scores(40), rtol=0, atol=1e-4)
    plain = query[:, 0, 0] @ key[:, 0, 0].t()
    assert (scores(0) - plain).abs().max() > 0.1
    torch.testing.assert_close(scores(0).diagonal(), plain.diagonal(), rtol=0, atol=1e-5)


def test_one_table_serves_all_consecutive_rows() -> None:
    table = RotaryTable(HEAD_DIM, THETA, torch.bfloat16)
    table.set_positions(CONSECUTIVE, True)
    first = table()
    assert first.shape == (2, 7, 1, 1, HEAD_DIM // 2) and first.dtype == torch.bfloat16
    table.set_positions(CONSECUTIVE.clone(), True)
    assert table() is first
    table.set_positions(CONSECUTIVE[:, :4], True)
    torch.testing.assert_close(table(), first[:, :4])
    # Other positions of the same length do not take it.
    table.set_positions(POSITIONS, False)
    assert table().shape == (2, 7, 3, 1, HEAD_DIM // 2)
    assert not torch.equal(table()[:, :, :1], first)
