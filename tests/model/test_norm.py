"""RMSNorm against closed formulas, torch's own, and the table of what epsilon does to a model drawn small."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.ranks import RankPool

from megagamma.errors import ConfigurationError
from megagamma.model.norm import RMSNorm

# RMS of the first norm's output at step 0, s / sqrt(s^2 + epsilon) with s = d^-gamma, to three digits.
WIDTHS = (256, 512, 1024, 2048, 4096, 7168)
TABLE = {
    (1.0, 1e-5): (0.777, 0.525, 0.295, 0.153, 0.077, 0.044),
    (1.0, 1e-6): (0.969, 0.890, 0.699, 0.439, 0.237, 0.138),
    (1.0, 1.19e-7): (0.996, 0.985, 0.943, 0.817, 0.578, 0.375),
    (1.0, 1e-8): (1.00, 0.999, 0.995, 0.980, 0.925, 0.813),
    (1.0, 1e-12): (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    (0.75, 1e-5): (0.980, 0.947, 0.868, 0.720, 0.525, 0.376),
    (0.5, 1e-5): (0.999, 0.997, 0.995, 0.990, 0.980, 0.966),
    (1.25, 1e-5): (0.295, 0.129, 0.055, 0.023, 0.010, 0.005),
}


def first_norm_rms(width: int, rows: list[tuple[float, float]]) -> list[float]:
    """RMS of the first norm's output in a really built and filled model, for several (gamma, epsilon)."""
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.model.gpt import build_model
    from megagamma.model.initialize import fill
    from megagamma.model.parameters import ParameterMap

    found = []
    for gamma, epsilon in rows:
        config = parse_config(
            [
                *("--data.corpus", "tiny", "--model.hidden_size", str(width), "--model.num_layers", "1"),
                *("--model.num_attention_heads", "1", "--model.head_dim", "16", "--model.ffn_hidden_size", "16"),
                *("--model.vocab_size", "256", "--init.gamma", str(gamma), "--model.norm_epsilon", str(epsilon)),
            ]
        )
        runtime = Runtime(config)
        chunk = build_model(config, torch.float32, runtime.device)[0]
        fill(ParameterMap([chunk], config.model, 0, 1), config)
        with torch.no_grad():
            embedded = chunk.embedding(torch.arange(256).unsqueeze(0), None)
            normed = chunk.decoder.layers[0].input_layernorm(embedded)
        found.append(float(normed.double().square().mean().sqrt()))
        runtime.close_groups()
    return found


# The formula above holds for every width; a built model of the smallest and the largest is enough for each day.
@pytest.mark.parametrize(
    "column",
    [
        pytest.param(column, id=f"d{width}", marks=[] if width in (min(WIDTHS), max(WIDTHS)) else pytest.mark.slow)
        for column, width in enumerate(WIDTHS)
    ],
)
def test_built_model_reproduces_the_saturation_table(one_rank: RankPool, column: int) -> None:
    found = one_rank.run(first_norm_rms, WIDTHS[column], list(TABLE))[0]
    for (gamma, epsilon), rms in zip(TABLE, found, strict=True):
        # Half a unit of the printed digit, and what a finite draw scatters.
        expected = TABLE[gamma, epsilon][column]
        assert rms == pytest.approx(expected, abs=6e-4, rel=0.01), (gamma, epsilon)


def norm_of(width: int, epsilon: float, dtype: torch.dtype = torch.float32) -> RMSNorm:
    config = SimpleNamespace(use_cpu_initialization=True, params_dtype=dtype, sequence_parallel=False)
    norm = RMSNorm(config, width, eps=epsilon)
    norm.weight.data.copy_(torch.linspace(0.5, 1.5, width))
    return norm


def closed_form(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_forward_and_gradients_are_the_closed_formula(epsilon: float, scale: float) -> None:
    norm = norm_of(96, epsilon)
    x = (torch.randn(5, 3, 96) * scale).requires_grad_()
    upstream = torch.randn(5, 3, 96)
    norm(x).backward(upstream)
    exact = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    expected = closed_form(exact, weight, epsilon)
    expected.backward(upstream.double())
    assert exact.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-6 * float(exact.grad.abs().max()))
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


def test_gpu_and_cpu_forms_agree() -> None:
    norm = norm_of(64, 1e-12)
    x = torch.randn(4, 2, 64) * 1e-3
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (64,), norm.weight, 1e-12))


@pytest.mark.parametrize("form", ["cpu", "torch"])
def test_small_bf16_inputs_keep_their_scale(form: str) -> None:
    """rms 1e-4 with epsilon 1e-12 must give rms 1; with statistics in bf16, or a clamped epsilon, it would not."""
    norm = norm_of(256, 1e-12, torch.bfloat16)
    norm.weight.data.fill_(1.0)
    x = (torch.randn(8, 256) * 1e-4).bfloat16()
    out = norm(x) if form == "cpu" else torch.nn.functional.rms_norm(x, (256,), norm.weight, 1e-12)
    assert out.dtype == torch.bfloat16
    assert float(out.detach().double().square().mean().sqrt()) == pytest.approx(1.0, abs=5e-3)
    clamped = closed_form(x, norm.weight, 1e-5)
    assert float(clamped.detach().square().mean().sqrt()) < 0.05


def wrong_epsilon() -> str:
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.model.gpt import assert_norms, build_model

    config = parse_config(["--data.corpus", "tiny", "--model.vocab_size", "256", "--model.num_layers", "2"])
    runtime = Runtime(config)
    chunks = build_model(config, torch.float32, runtime.device)
    # Two block norms and two q/k norms in each of two layers, and the final norm.
    assert assert_norms(list(chunks), config.model.norm_epsilon) == 9
    chunks[0].decoder.layers[1].self_attention.k_layernorm.eps = 1e-6
    try:
        assert_norms(list(chunks), config.model.norm_epsilon)
    except ConfigurationError as error:
        return str(error)
    finally:
        runtime.close_groups()
    return ""


def test_a_norm_with_another_epsilon_is_refused(one_rank: RankPool) -> None:
    message = one_rank.run(wrong_epsilon)[0]
    assert "layers.1.self_attention.k_layernorm" in message
    assert "1e-06" in message
