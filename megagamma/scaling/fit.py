"""Scaling laws L(N, D) = E + A N^-a + B D^-b, of several arms at once with one irreducible loss E, and their intervals.

Form: Hoffmann et al., arXiv 2203.15556, approach 3 [REF]: Huber's loss on residuals of log L. Start: variable projection, that
is a grid over exponents inside which A and B are linear (Golub and Pereyra 1973; for these laws arXiv 2603.22339 [REF]), then
trust-region least squares with the exact Jacobian, from a wide Huber delta down to the asked one. Replications found published
intervals too narrow where the optimizer stopped early (arXiv 2404.10102 [REF]); `tests/scaling/test_fit.py` holds this fit to
that paper's data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from megagamma.errors import ConfigurationError

Form = Literal["both", "size", "tokens"]
FEWEST = 4
"""Different sizes, or token counts, from which an exponent is said."""
DELTA = 1e-3
"""Huber's delta on log L, as arXiv 2203.15556."""
_LOW, _HIGH = 0.01, 2.0  # exponents
_LEAST_LOG, _MOST_LOG = -12.0, 7.0  # of a term at the middle of the data, in nats
_GRID = np.geomspace(0.03, 1.5, 24)
_E_STEPS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)  # of the lowest loss
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """One finished run."""

    arm: str
    size: float
    """N, parameters by whatever convention."""
    tokens: float
    """D."""
    loss: float
    """Held-out. Unit: nats per token."""
    seed: int
    data: str
    """Of what the loss is of: name or fingerprint of the held-out set."""
    name: str
    """For messages."""


@dataclass(frozen=True)
class Term:
    """coefficient x (x / scale)^-exponent."""

    coefficient: float
    exponent: float
    scale: float

    def at(self, x: float) -> float:
        """Nats at a size or a number of tokens."""
        return self.coefficient * (x / self.scale) ** -self.exponent

    def reaching(self, value: float) -> float:
        """The x at which the term is a value; infinite where it never is."""
        return self.scale * (value / self.coefficient) ** (-1.0 / self.exponent) if value > 0 else math.inf


@dataclass(frozen=True)
class Law:
    """A fitted law of every arm."""

    irreducible: float
    """E, shared. Unit: nats per token."""
    size: Mapping[str, Term]
    """By arm; empty for form `tokens`."""
    tokens: Mapping[str, Term]
    """By arm; empty for form `size`."""
    cost: float
    """Huber's loss, summed over observations, over delta squared."""
    notes: tuple[str, ...]
    """What is not determined: an exponent at its bound, an irreducible loss of 0."""

    def at(self, arm: str, size: float, tokens: float) -> float:
        """Predicted loss."""
        terms = [(self.size.get(arm), size), (self.tokens.get(arm), tokens)]
        return self.irreducible + sum(term.at(x) for term, x in terms if term is not None)


def check(observations: Sequence[Observation], form: Form) -> None:
    """Refuse what no exponent can be said from.

    Raises:
        ConfigurationError: a loss is not a finite positive number; losses are of different data; an arm has too few sizes
            or token counts; sizes and tokens move together.
    """
    if not observations:
        raise ConfigurationError("there are no finished points to fit: see the sweep's status")
    for one in observations:
        if not (math.isfinite(one.loss) and one.loss > 0 and one.size > 0 and one.tokens > 0):
            raise ConfigurationError(f"{one.name}: loss {one.loss} at size {one.size:g}: leave this point out")
    sets = {one.data: one.name for one in observations}
    if len(sets) > 1:
        (first, a), (second, b) = itertools.islice(sets.items(), 2)
        raise ConfigurationError(f"{a} is measured on {first}, {b} on {second}: losses on different data make no law")
    for arm in dict.fromkeys(one.arm for one in observations):
        own = [one for one in observations if one.arm == arm]
        for needed, values in (("size", {one.size for one in own}), ("tokens", {one.tokens for one in own})):
            if form in ("both", needed) and len(values) < FEWEST:
                what, other = ("sizes", "tokens") if needed == "size" else ("token counts", "size")
                raise ConfigurationError(
                    f"arm {arm}: has {len(values)} different {what}, and an exponent needs {FEWEST}: add points, or use "
                    f"--form {other}"
                )
        x, y = np.log([one.size for one in own]), np.log([one.tokens for one in own])
        if form == "both" and abs(np.corrcoef(x, y)[0, 1]) > 0.999:
            raise ConfigurationError(
                f"arm {arm}: sizes and tokens move together, so that their exponents cannot be told apart: give several token "
                "counts per size, or use --form size"
            )


class _Problem:
    """Observations as arrays, and the parameters' places: log E, then per arm log A, a, log B, b."""

    def __init__(self, observations: Sequence[Observation], form: Form, delta: float) -> None:
        self.form, self.delta = form, delta
        self.arms = list(dict.fromkeys(one.arm for one in observations))
        self.arm = np.array([self.arms.index(one.arm) for one in observations])
        self.loss = np.array([one.loss for one in observations])
        columns = {"size": [one.size for one in observations], "tokens": [one.tokens for one in observations]}
        self.kinds = [kind for kind in ("size", "tokens") if form in ("both", kind)]
        self.scale = {kind: float(np.exp(np.mean(np.log(columns[kind])))) for kind in self.kinds}
        self.log = {kind: np.log(np.array(columns[kind]) / self.scale[kind]) for kind in self.kinds}
        self.width = 2 * len(self.kinds)

    def terms(self, x: Array) -> tuple[Array, list[Array]]:
        """Predicted loss of every observation, and each kind's term."""
        base = 1 + self.arm * self.width
        parts = [
            np.exp(x[base + 2 * place] - x[base + 2 * place + 1] * self.log[kind])
            for place, kind in enumerate(self.kinds)
        ]
        return np.exp(x[0]) + sum(parts), parts

    def residual(self, x: Array) -> Array:
        return np.log(self.terms(x)[0] / self.loss)

    def jacobian(self, x: Array) -> Array:
        predicted, parts = self.terms(x)
        found = np.zeros((len(self.loss), len(x)))
        found[:, 0] = np.exp(x[0]) / predicted
        rows, base = np.arange(len(self.loss)), 1 + self.arm * self.width
        for place, kind in enumerate(self.kinds):
            found[rows, base + 2 * place] = parts[place] / predicted
            found[rows, base + 2 * place + 1] = -parts[place] * self.log[kind] / predicted
        return found

    def _grid(self, own: NDArray[np.bool_], irreducible: float) -> tuple[float, list[float]]:
        """(cost, log coefficients and exponents) of one arm's best point of the grid at a given E."""
        best: tuple[float, list[float]] = (math.inf, [])
        target = 1.0 - irreducible / self.loss[own]
        for exponents in itertools.product(_GRID, repeat=len(self.kinds)):
            columns = [
                np.exp(-exponent * self.log[kind][own]) / self.loss[own]
                for exponent, kind in zip(exponents, self.kinds, strict=True)
            ]
            coefficients, cost = nnls(np.stack(columns, axis=1), target)
            if cost < best[0] and (coefficients > 0).all():
                pairs = zip(np.log(coefficients), exponents, strict=True)
                best = (float(cost), [float(value) for pair in pairs for value in pair])
        return best

    def start(self) -> Array:
        """The best point of the grid over E and exponents, by squares of relative residuals."""
        best: tuple[float, list[float]] = (math.inf, [])
        for share in _E_STEPS:
            irreducible = share * float(self.loss.min())
            of_arms = [self._grid(self.arm == index, irreducible) for index in range(len(self.arms))]
            cost = math.fsum(one[0] ** 2 for one in of_arms)
            if cost < best[0]:
                best = (cost, [math.log(max(irreducible, 1e-3)), *(value for one in of_arms for value in one[1])])
        if not best[1]:
            raise ConfigurationError(
                "no law of this form comes near: losses must fall with size and tokens; look at the points"
            )
        return np.array(best[1])

    def polish(self, x: Array) -> tuple[Array, float]:
        """(parameters, cost) of the least Huber loss near a start."""
        low, high = np.full(len(x), -np.inf), np.full(len(x), np.inf)
        for first in range(1, len(x), 2):
            low[first], high[first] = _LEAST_LOG, _MOST_LOG
            low[first + 1], high[first + 1] = _LOW, _HIGH
        low[0], high[0] = math.log(1e-4), math.log(float(self.loss.min()))
        found = None
        for delta in sorted({max(0.03, self.delta), max(0.005, self.delta), self.delta}, reverse=True):
            x = np.clip(x, low + 1e-9, high - 1e-9)
            found = least_squares(
                self.residual, x, self.jacobian, bounds=(low, high), loss="huber", f_scale=delta, x_scale="jac",
                ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=2000,
            )  # fmt: skip
            x = found.x
        assert found is not None
        return x, float(found.cost) / self.delta**2

    def law(self, x: Array, cost: float) -> Law:
        notes = []
        if x[0] < math.log(1e-3):
            notes.append("the irreducible loss is 0 at its bound: larger or longer runs are needed to see one")
        terms: dict[str, dict[str, Term]] = {"size": {}, "tokens": {}}
        for index, arm in enumerate(self.arms):
            for place, kind in enumerate(self.kinds):
                first = 1 + index * self.width + 2 * place
                exponent = float(x[first + 1])
                if not _LOW * 1.01 < exponent < _HIGH * 0.99:
                    notes.append(
                        f"arm {arm}: the exponent of {kind} is at its bound, {exponent:.2f}: it is not determined"
                    )
                terms[kind][arm] = Term(float(np.exp(x[first])), exponent, self.scale[kind])
        return Law(float(np.exp(x[0])), terms["size"], terms["tokens"], cost, tuple(notes))

    def parameters(self, law: Law) -> Array:
        """A law's parameters, by this problem's scales."""
        found = [math.log(law.irreducible)]
        for arm in self.arms:
            for kind in self.kinds:
                term = (law.size if kind == "size" else law.tokens)[arm]
                found += [math.log(term.at(self.scale[kind])), term.exponent]
        return np.array(found)


def fit(observations: Sequence[Observation], form: Form = "both", delta: float = DELTA, near: Law | None = None) -> Law:
    """The law of least Huber loss.

    Args:
        near: a law to start from, in place of the grid.

    Raises:
        ConfigurationError: see `check`; or no law of this form comes near, or an arm's losses do not fall.
    """
    check(observations, form)
    law = _fit(observations, form, delta, near)
    for kind, terms in (("size", law.size), ("tokens", law.tokens)):
        for arm, term in terms.items():
            if term.coefficient < 1e-3 * law.irreducible:
                raise ConfigurationError(
                    f"arm {arm}: losses do not fall with {kind}, so that no law fits: look at the points"
                )
    return law


def _fit(observations: Sequence[Observation], form: Form, delta: float, near: Law | None) -> Law:
    problem = _Problem(observations, form, delta)
    start = problem.start() if near is None else problem.parameters(near)
    return problem.law(*problem.polish(start))


def resampled(observations: Sequence[Observation], form: Form, generator: np.random.Generator) -> list[Observation]:
    """A bootstrap draw: points (a size and a token count, the same of every arm), and seeds within them.

    Arms keep their pairing by point and seed. Draws with too few different sizes or tokens are drawn again.
    """
    cells: dict[tuple[float, float], dict[int, list[Observation]]] = {}
    for one in observations:
        cells.setdefault((one.size, one.tokens), {}).setdefault(one.seed, []).append(one)
    keys = list(cells)
    while True:
        chosen = [keys[index] for index in generator.integers(0, len(keys), len(keys))]
        enough = all(
            len({key[place] for key in chosen}) >= min(FEWEST, len({key[place] for key in keys}))
            for place, kind in enumerate(("size", "tokens"))
            if form in ("both", kind)
        )
        if enough:
            break
    found: list[Observation] = []
    for key in chosen:
        seeds = list(cells[key])
        for index in generator.integers(0, len(seeds), len(seeds)):
            found += cells[key][seeds[index]]
    return found


def bootstrap(
    observations: Sequence[Observation], law: Law, form: Form, delta: float = DELTA, draws: int = 200, seed: int = 0
) -> list[Law]:
    """Laws of resampled observations; those in which an arm is missing, or no law comes near, are left out."""
    generator, arms, found = np.random.default_rng(seed), {one.arm for one in observations}, []
    for _ in range(draws):
        drawn = resampled(observations, form, generator)
        if {one.arm for one in drawn} == arms:
            found.append(_fit(drawn, form, delta, law))
    return found


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a bootstrap, by percentiles; infinite values are values."""
    ordered = sorted(values)
    return ordered[int(0.025 * (len(ordered) - 1))], ordered[math.ceil(0.975 * (len(ordered) - 1))]


def speed_up(law: Law, baseline: str, arm: str, size: float, tokens: float) -> float:
    """How many times fewer FLOPs an arm needs for the baseline's loss: fewer tokens at the same size, or for form `size` fewer
    parameters at the same tokens. 0: it never reaches that loss."""
    target = law.at(baseline, size, tokens) - law.irreducible
    if law.tokens:
        rest = target - (law.size[arm].at(size) if law.size else 0.0)
        return tokens / law.tokens[arm].reaching(rest)
    return size / law.size[arm].reaching(target)


def without_largest(observations: Sequence[Observation], form: Form, delta: float) -> tuple[float, int] | None:
    """(largest relative error, points) of predicting the largest size, or the most tokens, from the others; None: too few."""
    kind = "tokens" if form == "tokens" else "size"
    top = max(getattr(one, kind) for one in observations)
    kept = [one for one in observations if getattr(one, kind) < top]
    left_out = [one for one in observations if getattr(one, kind) == top]
    if len({getattr(one, kind) for one in kept}) < 3:
        return None
    law = _fit(kept, form, delta, None)
    return max(abs(law.at(one.arm, one.size, one.tokens) / one.loss - 1.0) for one in left_out), len(left_out)


def isoflops(observations: Sequence[Observation]) -> list[dict[str, str | float]]:
    """The best size of each arm at each budget of equal N D, by a parabola in log N through means over seeds.

    A cross-check only: such optima are biased even without noise (arXiv 2603.22339 [REF]). Where the lowest point is at an
    edge, or the parabola opens downwards, no size is said.
    """
    groups: dict[tuple[str, int], list[Observation]] = {}
    for one in averaged(observations):
        groups.setdefault((one.arm, round(math.log(one.size * one.tokens) / 0.05)), []).append(one)
    found: list[dict[str, str | float]] = []
    for (arm, _), own in groups.items():
        ordered = sorted(own, key=lambda one: one.size)
        if len({one.size for one in own}) < 3:
            continue
        curve, slope, _ = np.polyfit(np.log([one.size for one in ordered]), [one.loss for one in ordered], 2)
        lowest = min(range(len(ordered)), key=lambda index: ordered[index].loss)
        inside = 0 < lowest < len(ordered) - 1 and curve > 0
        best = f"{math.exp(-slope / (2 * curve)):.3g}" if inside else "at an edge: widen the sizes"
        found.append({"arm": arm, "flops": 6 * ordered[0].size * ordered[0].tokens, "best": best})
    return found


def averaged(observations: Sequence[Observation]) -> list[Observation]:
    """Means over seeds, for drawing."""
    groups: dict[tuple[str, float, float], list[Observation]] = {}
    for one in observations:
        groups.setdefault((one.arm, one.size, one.tokens), []).append(one)
    return [replace(of[0], loss=math.fsum(one.loss for one in of) / len(of)) for of in groups.values()]
