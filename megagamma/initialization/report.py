"""Target and measured std: a table per matrix and per role, and the norms' saturation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from megagamma.config.schema import ROLES, InitConfig
from megagamma.errors import InitializationError
from megagamma.initialization.gamma import attenuation, effective_gamma
from megagamma.initialization.streams import truncated_variance

# Input of a norm this many times sqrt(epsilon) or less is called saturated: attenuation 0.995 [INF].
SATURATION_FACTOR = 10.0
_CHUNK = 1 << 22  # numbers that are looked at together; unit: 32 MiB of float64


@dataclass
class WeightStatistics:
    """Sums over drawn numbers; two ranks' sums add up to the whole matrix's."""

    count: int = 0
    total: float = 0.0
    square: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> WeightStatistics:
        """Of all numbers of a tensor, in float64, a chunk at a time."""
        statistics = cls()
        if values.dim() == 2 and not values.is_contiguous():  # to flatten it would be to copy it whole
            for rows in values.split(max(1, _CHUNK // max(values.shape[1], 1))):
                statistics += cls.of(rows.contiguous())
            return statistics
        for chunk in values.detach().flatten().split(_CHUNK):
            wide = chunk.double()
            statistics += cls(wide.numel(), float(wide.sum()), float(wide.square().sum()))
        return statistics

    def __add__(self, other: WeightStatistics) -> WeightStatistics:
        return WeightStatistics(self.count + other.count, self.total + other.total, self.square + other.square)

    def times(self, factor: float) -> WeightStatistics:
        """Of as many numbers more, with the same mean and std."""
        return WeightStatistics(round(self.count * factor), self.total * factor, self.square * factor)

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def std(self) -> float:
        return math.sqrt(max(self.square / max(self.count, 1) - self.mean**2, 0.0))

    @property
    def rms(self) -> float:
        return math.sqrt(self.square / max(self.count, 1))


@dataclass
class MatrixReport:
    """One logical matrix, or one role: target and measured."""

    name: str
    role: str
    shape: list[int]
    d_in: int
    asked_std: float
    """The target."""
    measured_std: float
    measured_mean: float
    count: int
    z: float
    gamma: float


def measure(
    name: str,
    role: str,
    shape: tuple[int, ...],
    d_in: int,
    target: float,
    statistics: WeightStatistics,
    init: InitConfig,
) -> MatrixReport:
    """Compare a matrix's measured statistics with the target std.

    Returns:
        The report; `z` is the worse of the std's and the mean's distance in standard errors, signed.
    """
    z_std = (statistics.std / target - 1.0) / relative_standard_error(statistics.count, init)
    z_mean = statistics.mean / (target / math.sqrt(max(statistics.count, 1)))
    z = z_std if abs(z_std) >= abs(z_mean) else z_mean
    return MatrixReport(
        name,
        role,
        list(shape),
        d_in,
        target,
        statistics.std,
        statistics.mean,
        statistics.count,
        z,
        effective_gamma(target, d_in),
    )


def truncated_kurtosis(cut: float) -> float:
    """Kurtosis of a standard normal truncated at +-cut: m4 / m2^2 with m4 = 3 m2 - cut^2 (1 - m2).

    From m4 = 3 m2 - 2 cut^3 phi / P and m2 = 1 - 2 cut phi / P, with phi the density at the cut and P the mass within.
    """
    m2 = truncated_variance(cut)
    return (3.0 * m2 - cut * cut * (1.0 - m2)) / (m2 * m2)


def relative_standard_error(count: int, init: InitConfig) -> float:
    """Standard error of a measured std, over the std, for `count` draws: sqrt((kurtosis - 1) / (4 count))."""
    kurtosis = 3.0 if init.distribution == "normal" else truncated_kurtosis(init.truncate_at)
    return math.sqrt((kurtosis - 1.0) / (4.0 * max(count, 1)))


def by_role(matrices: Iterable[MatrixReport], init: InitConfig) -> list[MatrixReport]:
    """One row per role (and target std), its matrices pooled, in the order of `ROLES`."""
    pooled: dict[tuple[str, float], tuple[MatrixReport, WeightStatistics, int]] = {}
    for matrix in matrices:
        key = (matrix.role, matrix.asked_std)
        square = (matrix.measured_std**2 + matrix.measured_mean**2) * matrix.count
        statistics = WeightStatistics(matrix.count, matrix.measured_mean * matrix.count, square)
        if key in pooled:
            first, known, number = pooled[key]
            pooled[key] = (first, known + statistics, number + 1)
        else:
            pooled[key] = (matrix, statistics, 1)
    rows = []
    for (role, target), (first, statistics, number) in pooled.items():
        shape = tuple(first.shape)
        rows.append(measure(f"{number} x {role}", role, shape, first.d_in, target, statistics, init))
    order = {role: index for index, role in enumerate(ROLES)}
    return sorted(rows, key=lambda row: order.get(row.role, len(order)))


def table(rows: list[MatrixReport]) -> str:
    """The report as text, one line per row."""
    lines = [f"{'matrices':<22}{'shape':>18}{'d_in':>8}{'gamma':>8}{'target std':>13}{'measured':>13}{'z':>8}"]
    for row in rows:
        shape = "x".join(str(size) for size in row.shape)
        lines.append(
            f"{row.name:<22}{shape:>18}{row.d_in:>8}{row.gamma:>8.3f}{row.asked_std:>13.4e}"
            f"{row.measured_std:>13.4e}{row.z:>8.2f}"
        )
    return "\n".join(lines)


def check(matrices: Iterable[MatrixReport], max_z: float) -> None:
    """Refuse weights that were not drawn with their target std.

    Raises:
        InitializationError: naming the worst matrix, when any |z| exceeds `max_z`.
    """
    worst = max(matrices, key=lambda matrix: abs(matrix.z) if math.isfinite(matrix.z) else math.inf, default=None)
    if worst is not None and not abs(worst.z) <= max_z:
        raise InitializationError(
            f"{worst.name}: target std {worst.asked_std:.4e}, measured {worst.measured_std:.4e} with mean "
            f"{worst.measured_mean:.2e}, z = {worst.z:.1f} beyond init.max_z={max_z:g}: the weights are not those "
            "of the config; the run does not start"
        )


@dataclass
class NormSaturation:
    """A norm's expected input at step 0, and what epsilon does to it."""

    norm: str
    input_rms: float
    ratio: float
    attenuation: float
    saturated: bool


def norm_saturation(
    hidden_size: int, epsilon: float, qk_norm: bool, stds: Mapping[str, float], input_scale: float = 1.0
) -> list[NormSaturation]:
    """Expected saturation of the norms at step 0.

    The first norm reads the embedding, whose RMS is its std. At gamma 1 the residual stream stays near that value
    through all layers, so every block norm and the final norm see about the same [INF, simulated in method 2.1]; at
    gamma 0.5 the stream grows, and the later norms are safer than the first. A q/k norm reads W x with x of RMS
    `attenuation`: sqrt(hidden_size) * std * attenuation.

    Args:
        hidden_size: width of the residual stream.
        epsilon: of the norms.
        qk_norm: whether queries and keys are normed.
        stds: target std per role; needs embedding, query and key. A position embedding is added to the other.
        input_scale: what the model multiplies its embeddings with.
    """
    rows = []

    def add(norm: str, rms: float) -> float:
        ratio = rms / math.sqrt(epsilon)
        gain = attenuation(rms, epsilon)
        rows.append(NormSaturation(norm, rms, ratio, gain, ratio < SATURATION_FACTOR))
        return gain

    first = add("first norm (embedding)", input_scale * math.hypot(stds["embedding"], stds.get("position", 0.0)))
    if qk_norm:
        for role in ("query", "key"):
            add(f"{role} norm", math.sqrt(hidden_size) * stds[role] * first)
    return rows


def saturation_lines(rows: list[NormSaturation], epsilon: float) -> list[str]:
    """The saturation as text; saturated norms are warned about."""
    lines = []
    for row in rows:
        text = (
            f"{row.norm}: input rms {row.input_rms:.2e} = {row.ratio:.3g} x sqrt(epsilon={epsilon:g}), "
            f"output rms {row.attenuation:.3f}"
        )
        if row.saturated:
            text = f"WARNING {text}: saturated, which hides the effect of a small init; use a norm epsilon of 1e-12"
        lines.append(text)
    return lines


def as_json(
    matrices: list[MatrixReport], roles: list[MatrixReport], saturation: list[NormSaturation], init: InitConfig
) -> dict[str, Any]:
    """Content of init_report.json."""
    return {
        "init": asdict(init),
        "roles": [asdict(row) for row in roles],
        "norms": [asdict(row) for row in saturation],
        "matrices": [asdict(row) for row in matrices],
    }
