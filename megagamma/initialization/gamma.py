"""The method: role and d_in of a matrix -> the standard deviation that it is drawn with.

std = d_in^-gamma, with d_in the input dimension of the whole logical matrix, never of a shard. By default the two
matrices of a layer that write to the residual stream are also divided by sqrt(2 layers) (`init.depth_scale`).

From "Small Initialization Matters for Large Language Models" (arXiv 2606.17945); the formula with d_in is spelled out in
arXiv 2608.30315, section 3.3, of the same group. gamma is the exponent of the standard deviation: 0.5 is the usual
1/sqrt(d_in), and 1 the small initialization. `SCHEMES` holds the method and the baselines that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megagamma.config.schema import InitConfig

# The matrices of a layer whose output is added to the residual stream; the last two in a mixture of experts.
RESIDUAL_ROLES = ("attention_output", "mlp_down", "expert_down", "shared_down")

DEEPSEEK_STD = 0.006
MEGATRON_STD = 0.02


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that initialization depends on."""

    hidden_size: int
    num_layers: int


def d_in(role: str, shape: tuple[int, ...], hidden_size: int, residual_fan_in: Literal["d_in", "hidden"]) -> int:
    """Input dimension of a logical matrix.

    Args:
        role: one of `megagamma.config.schema.ROLES`.
        shape: global shape, (out, in) for projections and (vocabulary, hidden) for embedding and head.
        hidden_size: width of the residual stream.
        residual_fan_in: `d_in` takes the true input dimension of the two residual-writing matrices (heads x head_dim
            and ffn_hidden_size), `hidden` takes hidden_size for them, as the paper group's code does.

    Returns:
        d_in. For the embedding it is hidden_size, not the vocabulary, as in the group's code.
    """
    if role in RESIDUAL_ROLES and residual_fan_in == "hidden":
        return hidden_size
    return shape[1]


def asked(init: InitConfig, role: str, shape: tuple[int, ...], model: ModelShape) -> tuple[int, float]:
    """d_in and target std of a logical matrix of a global shape."""
    inputs = d_in(role, shape, model.hidden_size, init.residual_fan_in)
    return inputs, target_std(init, role, inputs, model)


def truncation(init: InitConfig) -> float | None:
    """Where draws are cut. Unit: standard deviations; None: nowhere."""
    return init.truncate_at if init.distribution == "truncated" else None


def exponent(init: InitConfig, role: str) -> float:
    """gamma of a role: its own where given, else the global one."""
    return float(init.exponents.get(role, init.gamma))


def _depth(role: str, shape: ModelShape) -> float:
    """1 / sqrt(2 layers) for the residual-writing matrices, else 1."""
    return 1.0 / math.sqrt(2.0 * shape.num_layers) if role in RESIDUAL_ROLES else 1.0


def _power(init: InitConfig, role: str, d_in: int, shape: ModelShape, gamma: float) -> float:
    return float(d_in) ** -gamma * (_depth(role, shape) if init.depth_scale else 1.0)


def _gamma(init: InitConfig, role: str, d_in: int, shape: ModelShape) -> float:
    return _power(init, role, d_in, shape, exponent(init, role))


def _inverse_sqrt(init: InitConfig, role: str, d_in: int, shape: ModelShape) -> float:
    return _power(init, role, d_in, shape, 0.5)


def _neox_small(_init: InitConfig, role: str, _d_in: int, shape: ModelShape) -> float:
    if role in RESIDUAL_ROLES:
        return 2.0 / (shape.num_layers * math.sqrt(shape.hidden_size))
    return math.sqrt(2.0 / (5.0 * shape.hidden_size))


def _mup(init: InitConfig, role: str, d_in: int, shape: ModelShape) -> float:
    """Of arXiv 2203.03466, table 3: variance 1 / fan-in in hidden matrices, 1 / fan-in^2 in the head, else constant."""
    base = float(init.mup_base_width)
    if role == "embedding":
        return base**-0.5
    if role == "head":
        return _power(init, role, d_in, shape, 0.5) * math.sqrt(base / shape.hidden_size)
    return _power(init, role, d_in, shape, 0.5)


def _mup_rate(init: InitConfig, role: str, shape: ModelShape) -> float:
    """Of the same table, for Adam: 1 / fan-in in hidden matrices and the head; constant in embedding and gains."""
    return 1.0 if role in ("embedding", "norm") else init.mup_base_width / shape.hidden_size


def _one_rate(_init: InitConfig, _role: str, _shape: ModelShape) -> float:
    return 1.0


@dataclass(frozen=True)
class Scheme:
    """A rule for the std of every matrix."""

    formula: str
    """L: layers; d: hidden_size; r: the two residual-writing matrices."""
    source: str
    std: Callable[[InitConfig, str, int, ModelShape], float]
    """(init, role, d_in, shape) -> std."""
    rate: Callable[[InitConfig, str, ModelShape], float] = _one_rate
    """(init, role, shape) -> learning-rate factor."""


SCHEMES = {
    "gamma": Scheme("d_in^-gamma; r: over sqrt(2L) with init.depth_scale", "[P, PRE]", _gamma),
    "fixed": Scheme("init.std", "[REF]", lambda init, *_: init.std),
    "fixed_depth": Scheme(
        "init.std; r: over sqrt(2L)", "[REF]", lambda init, role, _, shape: init.std * _depth(role, shape)
    ),
    "deepseek": Scheme("0.006", "[REF: DeepSeek-V3]", lambda *_: DEEPSEEK_STD),
    "inverse_sqrt": Scheme("d_in^-0.5; r: over sqrt(2L) with init.depth_scale", "[practice]", _inverse_sqrt),
    "megatron": Scheme(
        "0.02; r: over sqrt(2L)",
        "[REF: Megatron-LM's --init-method-std]",
        lambda _, role, __, shape: MEGATRON_STD * _depth(role, shape),
    ),
    "neox_small": Scheme(
        "sqrt(2 / (5d)); r: 2 / (L sqrt(d))", "[REF: GPT-NeoX's small_init and wang_init]", _neox_small
    ),
    "mup": Scheme(
        "d_in^-0.5; r: over sqrt(2L) with init.depth_scale; head: times sqrt(b/d); embedding: b^-0.5. Learning rates: times "
        "b/d, but for embedding and gains. b: init.mup_base_width",
        "[REF: arXiv 2203.03466, table 3]",
        _mup,
        _mup_rate,
    ),
}


def target_std(init: InitConfig, role: str, d_in: int, shape: ModelShape) -> float:
    """Standard deviation that a matrix is drawn with.

    Args:
        init: scheme, exponents and flags.
        role: one of `megagamma.config.schema.ROLES`.
        d_in: of the matrix, from the function `d_in`.
        shape: hidden size and depth of the model.

    Returns:
        The target std, dimensionless, by the formula of `SCHEMES`.

    Raises:
        ValueError: the scheme is not in `SCHEMES`.
    """
    if init.scheme not in SCHEMES:
        raise ValueError(f"init.scheme={init.scheme!r} is not known: use {', '.join(SCHEMES)}")
    return SCHEMES[init.scheme].std(init, role, d_in, shape)


def rate_factor(init: InitConfig, role: str, shape: ModelShape) -> float:
    """Learning-rate factor of a role, or of `norm`, by the scheme: 1 unless it sets learning rates.

    Raises:
        KeyError: the scheme is not in `SCHEMES`.
    """
    return SCHEMES[init.scheme].rate(init, role, shape)


def scheme_table() -> str:
    """`SCHEMES` as a Markdown table, for the docs."""
    rows = [f"| `{name}` | {scheme.formula} | {scheme.source} |" for name, scheme in SCHEMES.items()]
    return "\n".join(["| init.scheme | std | source |", "|---|---|---|", *rows])


def effective_gamma(std: float, d_in: int) -> float:
    """The exponent that a standard deviation amounts to at a width: -ln(std) / ln(d_in); not a number where d_in is 1."""
    if d_in < 2 or not std > 0:
        return math.nan
    return -math.log(std) / math.log(d_in)


def attenuation(rms: float, epsilon: float) -> float:
    """RMS of an RMSNorm's output (gain 1) for an input of a given RMS: s / sqrt(s^2 + epsilon).

    Well below 1, the norm only multiplies by 1/sqrt(epsilon): it is saturated, and hides the scale of what it reads.
    """
    return rms / math.sqrt(rms * rms + epsilon)
