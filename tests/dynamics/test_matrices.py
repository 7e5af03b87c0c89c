"""Numbers of matrices whose answer is known, and of random ones at three shapes."""

from __future__ import annotations

import math

import pytest
import torch

from megagamma.dynamics.matrices import (
    MOST_ROWS,
    Spectrum,
    clusters,
    cosine_error,
    cosines,
    mean_absolute_cosine,
    measure_matrix,
    ordered_cosines,
    random_absolute_cosine,
    singular_values,
    spectral_norm,
)
from megagamma.dynamics.measure import random_baseline


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(rows: int, inputs: int, groups: int, noise: float) -> torch.Tensor:
    """Rows around `groups` orthogonal directions, one after the other, of several lengths."""
    directions = torch.linalg.qr(random(inputs, groups, seed=1))[0].t()
    matrix = directions[torch.arange(rows) % groups] * torch.linspace(0.5, 4, rows).unsqueeze(1)
    return matrix + noise * random(rows, inputs, seed=2) / math.sqrt(inputs)


def with_spectrum(values: torch.Tensor, rows: int, inputs: int) -> torch.Tensor:
    left = torch.linalg.qr(random(rows, len(values), seed=3).double())[0]
    right = torch.linalg.qr(random(inputs, len(values), seed=4).double())[0]
    return (left * values) @ right.t()


def test_orthogonal() -> None:
    found = measure_matrix(torch.linalg.qr(random(48, 32))[0], spectrum=True)  # 32 orthonormal columns
    assert found["stable_rank"] == pytest.approx(32, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(32, rel=1e-5) and found["participation"] == pytest.approx(
        32, rel=1e-5
    )
    square = measure_matrix(torch.linalg.qr(random(32, 32))[0], spectrum=True)
    assert square["condensation"] == pytest.approx(0, abs=1e-6) and square["clusters_0.4"] == 1.0


def test_rank_one() -> None:
    matrix = torch.outer(torch.linspace(-2, 3, 40), random(24))
    found = measure_matrix(matrix, spectrum=True)
    assert found["condensation"] == pytest.approx(1, abs=1e-5)
    for name in ("stable_rank", "effective_rank", "participation"):
        assert found[name] == pytest.approx(1, abs=1e-3)
    assert found["clusters_0.7"] == 2 / 40, "a direction and its opposite"


@pytest.mark.parametrize("groups", [3, 7])
def test_planted_clusters(groups: int) -> None:
    matrix = planted(70, 64, groups, noise=0.3)
    assert clusters(cosines(matrix), 0.7) == groups
    assert clusters(cosines(planted(70, 64, groups, noise=4.0)), 0.7) > groups, "the control"
    # Within a group nearly 1, between groups nearly 0.
    expected = (70 / groups - 1) / 69
    assert mean_absolute_cosine(cosines(planted(70, 64, groups, noise=0.0))) == pytest.approx(expected, rel=0.05)
    ordered = ordered_cosines(matrix)
    # Neighbours in the map are alike more often than rows as they lie, where every third or seventh is.
    assert ordered.diagonal(1).mean() > cosines(matrix).diagonal(1).mean() + 0.3


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_planted_spectrum(shape: tuple[int, int]) -> None:
    values = torch.tensor([5.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    matrix = with_spectrum(values, *shape)
    found = singular_values(matrix)
    assert torch.allclose(found[:4], values, atol=1e-9) and found[4:].max() < 1e-6
    one = Spectrum.of(values)
    share = values / values.sum()
    assert one.stable_rank == pytest.approx((25 + 9 + 1 + 0.25) / 25)
    assert one.effective_rank == pytest.approx(math.exp(-float((share * share.log()).sum())))
    assert one.participation == pytest.approx(9.5**2 / 35.25)
    assert spectral_norm(matrix) == pytest.approx(5, rel=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (96, 512)])
def test_random_matrices(shape: tuple[int, int]) -> None:
    """Their numbers by theory: the mean of |cos|, and what the Marchenko-Pastur law says of the largest singular value."""
    baseline, found = random_baseline(shape, True), measure_matrix(random(*shape, seed=9), spectrum=True)
    assert baseline["condensation"] == pytest.approx(random_absolute_cosine(shape[1]), rel=0.02)
    rows, inputs = shape
    stable = rows * inputs / (math.sqrt(rows) + math.sqrt(inputs)) ** 2
    assert stable < baseline["stable_rank"] < 1.15 * stable
    for name, value in baseline.items():
        if name != "singular_values":
            assert found[name] == pytest.approx(value, rel=0.1), name
    mine, expected = (torch.tensor(one["singular_values"]) for one in (found, baseline))
    assert torch.allclose(mine, expected, atol=0.1 * float(expected.max()))
    # Negative control: a matrix with structure is further away.
    assert (
        measure_matrix(planted(*shape, groups=3, noise=0.3), spectrum=True)["condensation"]
        > 2 * baseline["condensation"]
    )


def test_many_rows_are_stood_for_within_the_error() -> None:
    matrix = random(3 * MOST_ROWS + 5, 16)
    unit = matrix / matrix.norm(dim=1, keepdim=True)
    exact = 0.0
    for chunk in unit.split(512):
        exact += float((chunk @ unit.t()).abs().sum(dtype=torch.float64))
    exact = (exact - len(matrix)) / (len(matrix) * (len(matrix) - 1))
    error = cosine_error(len(matrix), 16)
    assert 0 < error < 1e-3 and cosine_error(MOST_ROWS, 16) == 0
    assert abs(mean_absolute_cosine(cosines(matrix)) - exact) < 5 * error + 1e-4


def test_wide_matrices_without_a_whole_spectrum() -> None:
    matrix = random(1100, 1030)
    found = measure_matrix(matrix, spectrum=False)
    assert "effective_rank" not in found
    exact = torch.linalg.svdvals(matrix.double())
    assert found["stable_rank"] == pytest.approx(float(exact.square().sum() / exact.max() ** 2), rel=1e-5)
    assert not math.isfinite(measure_matrix(torch.zeros(4, 4), True)["stable_rank"]), "of nothing there is no rank"
