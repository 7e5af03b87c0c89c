"""The report: wrong weights are caught, right ones are not; pooling by role; warnings of saturated norms."""

import json
import math

import numpy as np
import pytest
import torch

from megagamma.config.schema import InitConfig, ModelConfig
from megagamma.errors import InitializationError
from megagamma.initialization import report
from megagamma.initialization.report import WeightStatistics, by_role, check, measure, norm_saturation, saturation_lines
from megagamma.initialization.streams import normal_

INIT = InitConfig()


def moments_of(values):
    values = np.asarray(values, dtype=np.float64)
    return WeightStatistics(values.size, float(values.sum()), float((values**2).sum()))


def drawn(std, *, name="w", shape=(300, 1000), **options):
    out = normal_(torch.empty(shape), seed=5, name=name, global_shape=shape, std=std, **options)
    return out.double().numpy()


def row(values, asked, init=INIT, name="w", role="query"):
    return measure(name, role, values.shape, values.shape[1], asked, moments_of(values), init)


# Statistics


def test_moments_add_up_to_those_of_the_whole():
    values = drawn(0.3) + 0.01
    whole = moments_of(values)
    pieces = sum((moments_of(piece) for piece in np.array_split(values, 7)), WeightStatistics())
    assert pieces.count == whole.count
    assert pieces.mean == pytest.approx(values.mean(), rel=1e-9)
    assert pieces.std == pytest.approx(values.std(), rel=1e-9)


def test_no_draws_have_no_statistics():
    assert (WeightStatistics().mean, WeightStatistics().std) == (0.0, 0.0)


# z-scores


@pytest.mark.parametrize("options", [{}, {"truncate": 1.0}, {"truncate": 3.0}])
def test_right_weights_pass(options):
    init = InitConfig(distribution="truncated", truncate_at=options["truncate"]) if options else INIT
    rows = [row(drawn(1e-3, name=f"w{i}", **options), 1e-3, init) for i in range(20)]
    check(rows, INIT.max_z)
    # z is the worse of two nearly independent scores: its mean square lies between 1 and 2.
    assert 0.7 < np.mean([r.z**2 for r in rows]) < 3.0


@pytest.mark.parametrize("factor", [0.98, 1.02, 2.0])
def test_a_wrong_std_is_caught(factor):
    rows = [row(drawn(1e-3), 1e-3), row(drawn(factor * 1e-3, name="bad"), 1e-3, name="bad")]
    assert abs(rows[0].z) < 4
    assert math.copysign(1, rows[1].z) == math.copysign(1, factor - 1)
    with pytest.raises(InitializationError, match=r"bad: target std 1\.0000e-03, measured .* beyond init\.max_z=6"):
        check(rows, 6.0)


def test_a_small_deviation_is_caught_exactly_at_its_size():
    """A std of 1 % too much in n draws is 0.01 sqrt(2 n) standard errors."""
    n = 300_000
    planted = measure("w", "query", (300, 1000), 1000, 1.0, WeightStatistics(n, 0.0, 1.01**2 * n), INIT)
    assert planted.z == pytest.approx(0.01 * math.sqrt(2 * n), rel=1e-9)


def test_a_wrong_mean_is_caught():
    values = drawn(1e-3)
    shifted = row(values + 3e-5, 1e-3)  # 16 standard errors of the mean, while the std is as asked
    assert shifted.measured_std == pytest.approx(row(values, 1e-3).measured_std)
    assert shifted.z > 12
    with pytest.raises(InitializationError):
        check([shifted], 6.0)


def test_a_wrong_distribution_has_wider_errors():
    """Truncated draws vary less: the same deviation is more standard errors."""
    n = 10_000
    found = WeightStatistics(n, 0.0, 1.02**2 * n)
    normal = measure("w", "query", (100, 100), 100, 1.0, found, INIT)
    narrow = InitConfig(distribution="truncated", truncate_at=1.0)
    truncated = measure("w", "query", (100, 100), 100, 1.0, found, narrow)
    z = np.linspace(-1, 1, 200_001)
    density = np.exp(-0.5 * z * z) / np.trapezoid(np.exp(-0.5 * z * z), z)
    kurtosis = np.trapezoid(z**4 * density, z) / np.trapezoid(z**2 * density, z) ** 2
    assert truncated.z / normal.z == pytest.approx(math.sqrt(2 / (kurtosis - 1)), rel=1e-6)


@pytest.mark.parametrize("values", [np.zeros((30, 100)), np.full((30, 100), np.nan)])
def test_weights_that_are_not_drawn_at_all_are_caught(values):
    with pytest.raises(InitializationError, match="the run does not start"):
        check([row(drawn(1e-3), 1e-3), row(values, 1e-3)], 6.0)


def test_nothing_to_check_passes():
    check([], 6.0)


# Pooling


def test_by_role_pools_matrices_and_keeps_the_order_of_roles():
    rows = [
        row(drawn(2e-3, name="k0"), 2e-3, name="k0", role="key"),
        row(drawn(1e-3, name="q0"), 1e-3, name="q0"),
        row(drawn(1e-3, name="q1"), 1e-3, name="q1"),
    ]
    pooled = by_role(rows, INIT)
    assert [(r.name, r.role, r.count) for r in pooled] == [
        ("2 x query", "query", 600_000),
        ("1 x key", "key", 300_000),
    ]
    both = np.concatenate([drawn(1e-3, name="q0"), drawn(1e-3, name="q1")])
    assert pooled[0].measured_std == pytest.approx(both.std(), rel=1e-9)
    assert pooled[0].z == pytest.approx(row(both, 1e-3).z, rel=1e-5)
    assert pooled[1].z == pytest.approx(rows[0].z, rel=1e-5)


def test_pooling_finds_a_bias_that_no_single_matrix_shows():
    one = WeightStatistics(20_000, 0.0, 1.006**2 * 20_000)
    rows = [measure(f"w{i}", "value", (100, 200), 200, 1.0, one, INIT) for i in range(100)]
    check(rows, 6.0)
    with pytest.raises(InitializationError):
        check(by_role(rows, INIT), 6.0)


def test_table_has_a_line_per_row():
    rows = [row(drawn(1e-3), 1e-3), row(drawn(2e-3), 2e-3, name="model.norm.weight")]
    lines = report.table(rows).split("\n")
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert "1.0000e-03" in lines[1]
    assert "300x1000" in lines[1]


# Norms


def model(width, epsilon, qk_norm=True):
    return ModelConfig(hidden_size=width, norm_epsilon=epsilon, qk_norm=qk_norm)


def test_saturation_is_called_below_ten_times_the_root_of_epsilon():
    for factor, saturated in ((9.99, True), (10.01, False)):
        (found,) = norm_saturation(64, 1e-6, False, {"embedding": factor * 1e-3})
        assert found.saturated is saturated
        assert found.ratio == pytest.approx(factor)


@pytest.mark.parametrize(
    ("gamma", "epsilon", "expected"), [(1.0, 1e-5, True), (1.0, 1e-12, False), (0.5, 1e-5, False), (0.5, 1e-12, False)]
)
def test_warnings_are_on_the_right_side(gamma, epsilon, expected):
    """Width 256, as the demos: gamma 1 needs the small epsilon, gamma 0.5 does not care."""
    std = 256.0**-gamma
    rows = norm_saturation(256, epsilon, True, {"embedding": std, "query": std, "key": std})
    assert rows[0].saturated is expected
    lines = saturation_lines(rows, epsilon)
    assert lines[0].startswith("WARNING ") is expected
    assert ("norm epsilon of 1e-12" in lines[0]) is expected
    assert len(lines) == 3


def test_query_and_key_norms_against_a_real_projection():
    """RMS of W norm(x), with x as small as an embedding drawn with gamma 1, at an epsilon that saturates."""
    width, epsilon = 512, 1e-5
    stds = {"embedding": 1 / 512, "query": 1 / 512, "key": 3 / 512}
    x = torch.from_numpy(drawn(stds["embedding"], name="x", shape=(200, width)))
    normed = torch.nn.functional.rms_norm(x, (width,), eps=epsilon)
    rows = norm_saturation(width, epsilon, True, stds)
    assert normed.square().mean().sqrt().item() == pytest.approx(rows[0].attenuation, rel=0.01)
    for name, found in zip(("query", "key"), rows[1:], strict=True):
        weight = torch.from_numpy(drawn(stds[name], name=name, shape=(256, width)))
        assert (normed @ weight.T).square().mean().sqrt().item() == pytest.approx(found.input_rms, rel=0.02)
        assert found.norm == f"{name} norm"


def test_json_is_plain(tmp_path):
    rows = [row(drawn(1e-3), 1e-3)]
    norms = norm_saturation(256, 1e-5, True, dict.fromkeys(("embedding", "query", "key"), 1e-3))
    text = json.dumps(report.as_json(rows, by_role(rows, INIT), norms, INIT))
    assert set(json.loads(text)) == {"init", "roles", "norms", "matrices"}
