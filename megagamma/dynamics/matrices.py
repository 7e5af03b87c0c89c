"""Numbers of one matrix: condensation, ranks, spectrum. Rows are neurons' input weights, as torch.nn.Linear stores them.

Sources, with the tags of docs/claims.md: mean |cos| and clusters [PRE: arXiv 2405.09409, 2501.08537]; stable rank [PRE:
2501.08537]; effective rank [PRE: 2510.06954]; participation ratio [REF: 2605.04396]. Formulas are at each function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagamma.initialization.streams import normal_

THRESHOLDS = (0.4, 0.7)
"""Cosines from which rows are one cluster [PRE: 0.4 in 2501.08537, 0.7 in 2405.05409]."""
MOST_ROWS = 2048
"""Rows whose cosines are all computed; of more, as many evenly spaced ones stand for all."""
EXACT_SIDE = 1024
"""Length of a matrix's shorter side up to which its whole spectrum is computed at every measurement."""


def rows_of(matrix: Tensor) -> Tensor:
    """The rows that stand for a matrix where all pairs are needed: [at most MOST_ROWS, in], float32."""
    count = matrix.shape[0]
    if count > MOST_ROWS:
        chosen = torch.arange(MOST_ROWS, device=matrix.device) * count // MOST_ROWS
        matrix = matrix[chosen]
    return matrix.float()


def cosines(matrix: Tensor) -> Tensor:
    """Cosine of every pair of rows, [rows, rows]; a row of zeros has cosine 0 with all."""
    rows = rows_of(matrix)
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (unit @ unit.t()).clamp_(-1.0, 1.0)


def mean_absolute_cosine(cosine: Tensor) -> float:
    """Mean of |cos| over pairs of different rows: 1 where all lie on one line."""
    count = cosine.shape[0]
    if count < 2:
        return math.nan
    off = cosine.abs().sum(dtype=torch.float64) - cosine.diagonal().abs().sum(dtype=torch.float64)
    return float(off) / (count * (count - 1))


def random_absolute_cosine(inputs: int) -> float:
    """Mean of |cos| of two random directions in `inputs` dimensions: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))."""
    return math.exp(math.lgamma(inputs / 2) - math.lgamma((inputs + 1) / 2)) / math.sqrt(math.pi)


def cosine_error(rows: int, inputs: int) -> float:
    """Standard error of a mean |cos| that `MOST_ROWS` rows stand for, if rows were random; 0 where all are there.

    From the variance of |cos|, 1/d - mean^2, over the pairs: those of one row are nearly independent.
    """
    if rows <= MOST_ROWS:
        return 0.0
    variance = max(1.0 / inputs - random_absolute_cosine(inputs) ** 2, 0.0)
    return math.sqrt(variance / (MOST_ROWS * (MOST_ROWS - 1) / 2))


def clusters(cosine: Tensor, threshold: float) -> int:
    """Number of groups: the first row takes all whose cosine with it exceeds the threshold, and so on with the rest."""
    near = (cosine > threshold).cpu().fill_diagonal_(True)
    left = near.sum(1) > 1  # a row that is near no other is a group, whoever comes first
    count = int((~left).sum())
    while True:
        remaining = left.nonzero()
        if len(remaining) == 0:
            return count
        first = int(remaining[0])
        left &= ~near[first]
        left[first] = False
        count += 1


def ordered_cosines(matrix: Tensor, most: int = 256) -> Tensor:
    """The cosine map, rows ordered by the leading eigenvector [PRE: 2510.06954]: [n, n], n at most `most`, on the CPU."""
    count = matrix.shape[0]
    if count > most:
        matrix = matrix[torch.arange(most, device=matrix.device) * count // most]
    cosine = cosines(matrix).double().cpu()
    leading = torch.linalg.eigh(cosine).eigenvectors[:, -1]
    order = torch.argsort(leading * torch.sign(leading.sum() + 1e-12))
    return cosine[order][:, order].float()


def spectral_norm(matrix: Tensor, tolerance: float = 1e-9, most: int = 400) -> float:
    """Largest singular value by Lanczos' method with full reorthogonalisation on the Gram matrix, in float64.

    It begins at a fixed draw, so that every source finds the same number, and ends when ten further steps raise the number by
    less than `tolerance` of itself. A random matrix is the slowest: its largest values lie close together.
    Source: G. H. Golub and C. F. Van Loan, Matrix Computations, section 10.1.
    """
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()).double()
    size = wide.shape[0]
    start = normal_(torch.empty(size), seed=0, name="vectors", global_shape=(size,)).double().to(wide.device)
    basis = torch.empty(min(most, size), size, dtype=torch.float64, device=wide.device)
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    found = 0.0
    for step in range(len(basis)):
        image = wide @ (wide.t() @ basis[step])
        diagonal.append(float(image @ basis[step]))
        for _ in range(2):  # once more, for what rounding left
            image = image - basis[: step + 1].t() @ (basis[: step + 1] @ image)
        length = float(image.norm())
        is_last = step + 1 == len(basis) or length <= 1e-14 * max(diagonal)
        if is_last or step % 10 == 9:
            tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            if beside:
                off = torch.tensor(beside, dtype=torch.float64)
                tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
            now = math.sqrt(max(float(torch.linalg.eigvalsh(tridiagonal)[-1]), 0.0))
            if is_last or now == 0.0 or now - found <= tolerance * now:
                return now
            found = now
        beside.append(length)
        basis[step + 1] = image / length
    return found


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values, descending, float64, from the Gram matrix of the shorter side.

    Those below about 1e-8 of the largest are lost in rounding, and come out as 0.
    """
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()).double()
    return torch.linalg.eigvalsh(wide @ wide.t()).flip(0).clamp_min(0.0).sqrt().cpu()


def spectrum_ranks(count: int, most: int = 48) -> list[int]:
    """Ranks from 1 to `count` whose singular values are kept: all of few, else evenly spaced in their logarithm."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({round(count ** (index / (most - 1))) for index in range(most)})


@dataclass(frozen=True)
class Spectrum:
    """What a spectrum comes to."""

    stable_rank: float
    """sum s^2 / max s^2."""
    effective_rank: float
    """exp of the entropy of s / sum s."""
    participation: float
    """(sum s)^2 / sum s^2."""

    @classmethod
    def of(cls, values: Tensor) -> Spectrum:
        """Of singular values; not a number where all are 0."""
        total, square = float(values.sum()), float(values.square().sum())
        if square == 0.0:
            return cls(math.nan, math.nan, math.nan)
        share = values[values > 0] / total
        entropy = -float((share * share.log()).sum())
        return cls(square / float(values.max()) ** 2, math.exp(entropy), total**2 / square)


def measure_matrix(matrix: Tensor, spectrum: bool) -> dict[str, Any]:
    """Numbers of a matrix, names as in dynamics.jsonl.

    Args:
        matrix: (out, in), any float dtype.
        spectrum: also what needs all singular values, and those of `spectrum_ranks` themselves; else the former only where the
            shorter side is at most `EXACT_SIDE`.
    """
    cosine = cosines(matrix)
    found: dict[str, Any] = {"condensation": mean_absolute_cosine(cosine)}
    for threshold in THRESHOLDS:
        found[f"clusters_{threshold:g}"] = clusters(cosine, threshold) / cosine.shape[0]
    del cosine
    if spectrum or min(matrix.shape) <= EXACT_SIDE:
        values = singular_values(matrix)
        one = Spectrum.of(values)
        if spectrum:
            found["singular_values"] = [float(values[rank - 1]) for rank in spectrum_ranks(len(values))]
        found |= {
            "stable_rank": one.stable_rank, "effective_rank": one.effective_rank, "participation": one.participation,
        }  # fmt: skip
    else:
        largest = spectral_norm(matrix)
        square = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
        found["stable_rank"] = square / largest**2 if largest else math.nan
    return found
