"""Compiled layers and regions under layouts and recomputation: the losses of torch's own kernels, to rounding."""

from __future__ import annotations

import pytest
import torch
from support.ranks import RankPool
from support.train import train_steps

from megagamma.training.choices import compiler_problem

LAYOUTS = {
    "ZeRO 3, full recomputation": "--deepspeed_config=configs/deepspeed/zero3.json --model.recompute=full",
    "sequence parallel": "--parallel.tensor=2 --parallel.sequence=true --model.recompute=selective",
    "pipeline, headwise gate": "--parallel.pipeline=2 --model.attention_gate=headwise",
    "ZeRO 1, no q/k-norm, no gate": "--model.attention_gate=none --model.qk_norm=false",
}
pytestmark = pytest.mark.skipif(compiler_problem(torch.device("cpu")) != "", reason="no C++ compiler")


@pytest.mark.parametrize(
    "layout", [name if name.startswith("pipeline") else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_losses(two_ranks: RankPool, data_cache: str, layout: str) -> None:
    # At the config's own learning rate rounding grows from step to step.
    base = ["--data.cache", data_cache, "--optimizer.lr=0.0003", *LAYOUTS[layout].split()]
    eager, compiled = (
        two_ranks.run(train_steps, [*base, f"--run.compile={word}"], 3, seconds=500)[0] for word in ("off", "on")
    )
    for (loss, norm), (expected, expected_norm) in zip(compiled, eager, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5) and norm == pytest.approx(expected_norm, rel=1e-4)
    assert compiled != eager or layout.startswith("ZeRO 3"), "rounding shows that other kernels ran"
