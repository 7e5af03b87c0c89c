"""The method: role and fan-in -> standard deviation, and the baselines that it is compared with.

The rule is std = d_in^-gamma, with d_in the input dimension of the whole logical matrix, never of a shard
("Small Initialization Matters for Large Language Models", arXiv 2606.17945; the formula with d_in is spelled
out in arXiv 2608.30315, section 3.3, of the same group). gamma is the exponent of the standard deviation, so
gamma = 0.5 is the usual 1/sqrt(d_in), and gamma = 1 the small initialization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megagamma.config.schema import InitConfig

# The two matrices of a layer whose output is added to the residual stream.
RESIDUAL_ROLES = ("attention_output", "mlp_down")

DEEPSEEK_STD = 0.006  # DeepSeek-V3, all parameters [REF]
MEGATRON_STD = 0.02  # Megatron-LM's --init-method-std [REF]


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that initialization depends on."""

    hidden_size: int
    num_layers: int


def fan_in(role: str, shape: tuple[int, ...], hidden_size: int, residual_fan_in: Literal["d_in", "hidden"]) -> int:
    """d_in of a logical matrix.

    Args:
        role: one of `megagamma.config.schema.ROLES`.
        shape: global shape, (out, in) for projections and (vocabulary, hidden) for embedding and head.
        hidden_size: width of the residual stream.
        residual_fan_in: `d_in` takes the true fan-in of the two residual-writing matrices (heads x head_dim and
            ffn_hidden_size), `hidden` takes hidden_size for them, as the paper group's code does.

    Returns:
        The input dimension. For the embedding it is hidden_size, not the vocabulary, as in the group's code.
    """
    if role in RESIDUAL_ROLES and residual_fan_in == "hidden":
        return hidden_size
    return shape[1]


def exponent(init: InitConfig, role: str) -> float:
    """gamma of a role: its own where given, else the global one."""
    own = getattr(init, role)
    return float(init.gamma if own is None else own)


def target_std(init: InitConfig, role: str, d_in: int, shape: ModelShape) -> float:
    """Standard deviation that a matrix is drawn with.

    Args:
        init: scheme, exponents and flags.
        role: one of `megagamma.config.schema.ROLES`.
        d_in: from `fan_in`.
        shape: hidden size and depth of the model.

    Returns:
        The asked standard deviation, dimensionless. Formulas by scheme, with L layers and width d:
        gamma: d_in^-gamma; inverse_sqrt: d_in^-1/2; both over sqrt(2L) for the residual-writing matrices when
        init.depth_scale. fixed: init.std. fixed_depth and megatron (0.02): std, over sqrt(2L) for those
        matrices. deepseek: 0.006. neox_small: sqrt(2/(5d)), and 2/(L sqrt(d)) for those matrices.
    """
    residual = role in RESIDUAL_ROLES
    depth = 1.0 / math.sqrt(2.0 * shape.num_layers) if residual else 1.0
    if init.scheme in ("gamma", "inverse_sqrt"):
        gamma = exponent(init, role) if init.scheme == "gamma" else 0.5
        return float(d_in) ** -gamma * (depth if init.depth_scale else 1.0)
    if init.scheme == "fixed":
        return init.std
    if init.scheme == "fixed_depth":
        return init.std * depth
    if init.scheme == "megatron":
        return MEGATRON_STD * depth
    if init.scheme == "deepseek":
        return DEEPSEEK_STD
    if init.scheme == "neox_small":
        if residual:
            return 2.0 / (shape.num_layers * math.sqrt(shape.hidden_size))
        return math.sqrt(2.0 / (5.0 * shape.hidden_size))
    raise ValueError(f"init.scheme={init.scheme!r} is not known")


def effective_gamma(std: float, d_in: int) -> float:
    """The exponent that a standard deviation amounts to at a width: -ln(std) / ln(d_in)."""
    return -math.log(std) / math.log(d_in)


def attenuation(rms: float, epsilon: float) -> float:
    """RMS of an RMSNorm's output (gain 1) for an input of a given RMS: s / sqrt(s^2 + epsilon).

    Well below 1, the norm only multiplies by 1/sqrt(epsilon): it is saturated, and hides the scale of what it reads.
    """
    return rms / math.sqrt(rms * rms + epsilon)


def truncated_moments(cut: float) -> tuple[float, float]:
    """Variance and kurtosis of a standard normal truncated at +-cut, before any rescaling.

    With z = cut, phi the density and Phi the distribution of the standard normal, and P = 2 Phi(z) - 1:
    m2 = 1 - 2 z phi / P, m4 = 3 m2 - 2 z^3 phi / P.
    """
    phi = math.exp(-0.5 * cut * cut) / math.sqrt(2.0 * math.pi)
    inside = math.erf(cut / math.sqrt(2.0))
    m2 = 1.0 - 2.0 * cut * phi / inside
    m4 = 3.0 * m2 - 2.0 * cut**3 * phi / inside
    return m2, m4 / (m2 * m2)


def relative_standard_error(count: int, init: InitConfig) -> float:
    """Standard error of a measured std, over the std, for `count` draws: sqrt((kurtosis - 1) / (4 count))."""
    kurtosis = 3.0 if init.distribution == "normal" else truncated_moments(init.truncate_at)[1]
    return math.sqrt((kurtosis - 1.0) / (4.0 * max(count, 1)))
