"""The rule and the baselines: closed formulas, fan-ins, conversions, and the table of effective exponents."""

import math
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from megagamma.config.schema import ROLES, InitConfig, ModelConfig, resolve_model
from megagamma.initialization.gamma import (
    SCHEMES,
    ModelShape,
    attenuation,
    d_in,
    effective_gamma,
    exponent,
    rate_factor,
    scheme_table,
    target_std,
)
from megagamma.initialization.report import norm_saturation, relative_standard_error, truncated_kurtosis
from megagamma.initialization.streams import truncated_variance
from megagamma.model.parameters import logical_parameters

LAYERS, WIDTH = 6, 48
SHAPE = ModelShape(WIDTH, LAYERS)
RESIDUAL = ("attention_output", "mlp_down")


def std(role, fan=WIDTH, **fields):
    return target_std(InitConfig(**fields), role, fan, SHAPE)


# Formulas per scheme


@pytest.mark.parametrize("gamma", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fan", [48, 80, 128])
def test_gamma_is_the_exponent_of_the_std(gamma, role, fan):
    plain = 1.0 / fan**gamma
    assert std(role, fan, gamma=gamma, depth_scale=False) == pytest.approx(plain, rel=1e-12)
    depth = math.sqrt(12) if role in RESIDUAL else 1.0
    assert std(role, fan, gamma=gamma) == pytest.approx(plain / depth, rel=1e-12)


@pytest.mark.parametrize("role", ROLES)
def test_baselines(role):
    residual = role in RESIDUAL
    depth = 1 / math.sqrt(12) if residual else 1.0
    assert std(role, scheme="fixed", std=0.03) == 0.03
    assert std(role, scheme="fixed_depth", std=0.03) == pytest.approx(0.03 * depth)
    assert std(role, scheme="megatron", std=0.5) == pytest.approx(0.02 * depth)
    assert std(role, scheme="deepseek", std=0.5) == 0.006
    assert std(role, 80, scheme="inverse_sqrt") == pytest.approx(depth / math.sqrt(80))
    assert std(role, 80, scheme="inverse_sqrt", depth_scale=False) == pytest.approx(1 / math.sqrt(80))
    wang, small = 2 / (6 * math.sqrt(48)), math.sqrt(2 / (5 * 48))
    assert std(role, 80, scheme="neox_small") == pytest.approx(wang if residual else small)


@pytest.mark.parametrize("role", ROLES)
def test_mup_by_width(role):
    """Table 3 of arXiv 2203.03466, relative to the base: std by the square root of the fan-in in hidden matrices, by the
    fan-in in the head, constant in the embedding; Adam's rates by the fan-in, but for the embedding."""
    base = InitConfig(scheme="mup", mup_base_width=48)
    for width in (48, 96, 384):
        shape, ratio = ModelShape(width, 6), width / 48
        usual = target_std(InitConfig(scheme="inverse_sqrt"), role, 48, ModelShape(48, 6))
        expected = usual / {"embedding": 1.0, "head": ratio}.get(role, math.sqrt(ratio))
        assert target_std(base, role, width, shape) == pytest.approx(expected)
        assert rate_factor(base, role, shape) == pytest.approx(1.0 if role == "embedding" else 1 / ratio)
        assert rate_factor(base, "norm", shape) == 1.0 and rate_factor(InitConfig(), role, shape) == 1.0


@pytest.mark.parametrize(
    "scheme", ["fixed", "fixed_depth", "deepseek", "inverse_sqrt", "megatron", "neox_small", "mup"]
)
@pytest.mark.parametrize("role", ROLES)
def test_baselines_do_not_depend_on_gamma(scheme, role):
    assert std(role, scheme=scheme, gamma=0.3) == std(role, scheme=scheme, gamma=2.0)


def test_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match=r"init\.scheme='xavier' is not known"):
        std("query", scheme="xavier")


def test_the_config_offers_the_schemes_of_the_table():
    assert get_args(get_type_hints(InitConfig)["scheme"]) == tuple(SCHEMES)


def test_the_docs_show_the_table():
    """docs/initialization.md holds what `scheme_table()` returns."""
    assert scheme_table() in (Path(__file__).parents[2] / "docs" / "initialization.md").read_text()


def test_exponent_of_a_role_stands_in_for_the_global_one():
    init = InitConfig(gamma=0.8, exponents={"embedding": 0.0, "query": 1.25})
    assert [exponent(init, role) for role in ("embedding", "query", "key")] == [0.0, 1.25, 0.8]
    assert target_std(init, "embedding", WIDTH, SHAPE) == 1.0
    assert target_std(init, "query", WIDTH, SHAPE) == pytest.approx(48**-1.25)
    assert target_std(init, "head", WIDTH, SHAPE) == pytest.approx(48**-0.8)


# Fan-in of every matrix, with grouped queries and heads * head_dim != hidden_size


@pytest.fixture(params=["none", "elementwise", "headwise"])
def model(request):
    return resolve_model(
        ModelConfig(
            hidden_size=WIDTH, num_layers=LAYERS, num_attention_heads=4, num_query_groups=2, head_dim=20,
            ffn_hidden_size=128, vocab_size=1000, attention_gate=request.param,
        )
    )  # fmt: skip


@pytest.mark.parametrize("residual_fan_in", ["d_in", "hidden"])
def test_d_in_of_every_matrix(model, residual_fan_in):
    expected = dict.fromkeys(ROLES, 48)  # the embedding's too: its width, not the vocabulary
    if residual_fan_in == "d_in":
        expected |= {"attention_output": 4 * 20, "mlp_down": 128}
    found = {}
    for logical in logical_parameters(model):
        if logical.role != "norm":
            found.setdefault(logical.role, set()).add(d_in(logical.role, logical.shape, WIDTH, residual_fan_in))
    if model.attention_gate == "none":
        del expected["gate"]
    assert found == {role: {fan} for role, fan in expected.items()}


@pytest.mark.parametrize("gamma", [0.5, 0.75, 1.0])
def test_shrunken_key_and_value_heads_keep_their_d_in(model, gamma):
    stds = {}
    for logical in logical_parameters(model):
        if logical.role != "norm":
            inputs = d_in(logical.role, logical.shape, WIDTH, "d_in")
            stds[logical.role] = target_std(InitConfig(gamma=gamma), logical.role, inputs, SHAPE)
    assert stds["query"] == stds["key"] == stds["value"] == stds["embedding"] == stds["head"] == 48.0**-gamma
    assert stds["attention_output"] == pytest.approx(80.0**-gamma / math.sqrt(12))
    assert stds["mlp_down"] == pytest.approx(128.0**-gamma / math.sqrt(12))


# Conversions


def test_effective_gamma_inverts_the_rule():
    for gamma in (0.25, 0.5, 1.0, 1.5):
        for fan in (64, 1024, 28672):
            assert effective_gamma(float(fan) ** -gamma, fan) == pytest.approx(gamma, rel=1e-12)


# Fixed stds as exponents, as printed in the project's notes on the method: widths, then a row per std.
WIDTHS = (256, 512, 768, 1024, 2048, 4096, 7168)
EFFECTIVE = {
    0.02: (".705", ".627", ".589", ".564", ".513", ".470", ".441"),
    0.006: (".923", ".820", ".770", ".738", ".671", ".615", ".576"),
}
STD_OF_GAMMA = {
    1.0: ("3.9e-3", "2.0e-3", "1.3e-3", "9.8e-4", "4.9e-4", "2.4e-4", "1.4e-4"),
    0.5: (".0625", ".0442", ".0361", ".0313", ".0221", ".0156", ".0118"),
}


@pytest.mark.parametrize("fixed", EFFECTIVE)
def test_a_fixed_std_is_an_exponent_that_falls_with_width(fixed):
    found = [f"{effective_gamma(fixed, width):.3f}" for width in WIDTHS]
    assert found == ["0" + text for text in EFFECTIVE[fixed]]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("gamma", STD_OF_GAMMA)
def test_std_of_an_exponent_by_width(gamma):
    for width, text in zip(WIDTHS, STD_OF_GAMMA[gamma], strict=True):
        found = target_std(InitConfig(gamma=gamma), "query", width, ModelShape(width, 4))
        digits = 2 if "e" in text else 3
        # Half a unit of the last printed digit.
        assert abs(found - float(text)) <= 0.5 * 10 ** (math.floor(math.log10(found)) - digits + 1) * 1.0001


# Truncated normal against numeric integrals


@pytest.mark.parametrize("cut", [0.5, 1.0, 2.0, 3.0, 5.0])
def test_truncated_variance_and_kurtosis_against_an_integral(cut):
    z = np.linspace(-cut, cut, 400_001)
    density = np.exp(-0.5 * z * z)
    mass = np.trapezoid(density, z)
    m2 = np.trapezoid(z**2 * density, z) / mass
    m4 = np.trapezoid(z**4 * density, z) / mass
    variance, kurtosis = truncated_variance(cut), truncated_kurtosis(cut)
    assert variance == pytest.approx(m2, rel=1e-8)
    assert kurtosis == pytest.approx(m4 / m2**2, rel=1e-8)


@pytest.mark.parametrize("options", [{}, {"distribution": "truncated", "truncate_at": 1.5}])
def test_relative_standard_error_against_repeated_draws(options):
    init, generator = InitConfig(**options), np.random.default_rng(7)
    draws = generator.standard_normal((3000, 900))
    if options:
        draws = np.where(np.abs(draws) > 1.5, np.nan, draws)[:, :]
        draws = draws[~np.isnan(draws)][: 3000 * 700].reshape(3000, 700)
    stds = draws.std(axis=1)
    # The spread of 3000 stds is itself known to 1.3 %.
    assert stds.std() / stds.mean() == pytest.approx(relative_standard_error(draws.shape[1], init), rel=0.06)


# Norms: printed table of s / sqrt(s^2 + epsilon), s = width^-gamma

ATTENUATION_WIDTHS = (256, 512, 1024, 2048, 4096, 7168)
ATTENUATION = {
    (1.0, 1e-5): (".777", ".525", ".295", ".153", ".077", ".044"),
    (1.0, 1e-6): (".969", ".890", ".699", ".439", ".237", ".138"),
    (1.0, 1.19e-7): (".996", ".985", ".943", ".817", ".578", ".375"),
    (1.0, 1e-8): ("1.00", ".999", ".995", ".980", ".925", ".813"),
    (1.0, 1e-12): ("1", "1", "1", "1", "1", "1"),
    (0.75, 1e-5): (".980", ".947", ".868", ".720", ".525", ".376"),
    (0.5, 1e-5): (".999", ".997", ".995", ".990", ".980", ".966"),
    (1.25, 1e-5): (".295", ".129", ".055", ".023", ".010", ".005"),
}


@pytest.mark.parametrize("key", ATTENUATION)
def test_attenuation_table(key):
    gamma, epsilon = key
    for width, text in zip(ATTENUATION_WIDTHS, ATTENUATION[key], strict=True):
        decimals = len(text.partition(".")[2])
        std = target_std(InitConfig(gamma=gamma), "embedding", width, ModelShape(width, 4))
        assert f"{attenuation(std, epsilon):.{decimals}f}" == f"{float(text):.{decimals}f}"
        rows = norm_saturation(width, epsilon, False, {"embedding": std})
        assert [row.attenuation for row in rows] == [attenuation(std, epsilon)]


@pytest.mark.parametrize(("epsilon", "width"), [(1e-5, 316), (1e-6, 1000), (1e-8, 10_000), (1e-12, 1_000_000)])
def test_critical_width_at_gamma_one(epsilon, width):
    """Where s = sqrt(epsilon), the output is attenuated to 1 / sqrt(2)."""
    assert attenuation(1.0 / width, epsilon) == pytest.approx(math.sqrt(0.5), rel=1e-3)


def test_attenuation_against_torch():
    import torch

    for rms, epsilon in ((1e-3, 1e-5), (1e-4, 1e-12), (0.5, 1e-6)):
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x / x.square().mean(-1, keepdim=True).sqrt() * rms
        found = torch.nn.functional.rms_norm(x, (512,), eps=epsilon).square().mean(-1).sqrt()
        assert found.tolist() == pytest.approx([attenuation(rms, epsilon)] * 4, rel=1e-9)
