"""Effects and interactions of a factorial sweep, planted and found again; and what is left out."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megagamma.scaling import effects as module
from megagamma.scaling.effects import contrast, effect_lines, effects, parameter_note
from megagamma.scaling.points import expand
from megagamma.scaling.spec import read_sweep


@pytest.fixture
def masks(tmp_path: Path, root: Path) -> tuple[Any, list[Any]]:
    sweep = read_sweep(root / "configs" / "sweeps" / "masks.yaml")
    return sweep, [SimpleNamespace(point=point, status="done", metrics=[]) for point in expand(sweep, tmp_path)]


HIDDEN = {"relaxed": 0.0, "epsilon1e-5": 0.02, "as4096": 0.2}
"""What a value of the norms' epsilon costs gamma 1, planted: more at the wider of the two sizes."""


def loss(state: Any) -> float:
    """Gamma 1 is better by 0.3, less so with a large epsilon, more so with the gate."""
    labels, config = state.point.labels, state.point.sized
    one, gate, norms = int(config.init.gamma == 1), int(labels["gate"] == "on"), labels["norms"]
    doublings = {"d32": 0.0, "d96": math.log2(3)}[labels["size"]]
    return (
        5 - 0.4 * doublings + 0.3 * state.point.seed
        - 0.3 * one + 0.01 * (norms == "as4096") - 0.1 * gate
        + HIDDEN[norms] * (1 + doublings) * one - 0.02 * one * gate * (norms == "relaxed")
        + 0.001 * state.point.seed * one
    )  # fmt: skip


def test_planted_effects_are_found(masks: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, states = masks
    monkeypatch.setattr(module, "final_loss", loss)
    found = {(one.axes, one.at): one for one in effects(sweep, states)}
    gamma, small, wide, gate = "init.gamma", "norms=epsilon1e-5", "norms=as4096", "gate"
    for size, times in (("d32", 1.0), ("d96", 1 + math.log2(3))):
        # By hand: other axes are averaged over, so that of three values each has a third of the weight.
        assert found[(gamma,), size].mean == pytest.approx(-0.3 + times * 0.22 / 3 - 0.02 / 6 + 0.002)
        assert found[(wide,), size].mean == pytest.approx(0.01 + times * 0.2 / 2 + 0.02 / 4)
        # Half of what the epsilon adds to gamma's effect; the gate, which relaxed norms reward, adds a quarter of 0.02.
        assert found[(gamma, wide), size].mean == pytest.approx((times * 0.2 + 0.02 / 2) / 2)
        assert found[(gamma, small), size].mean == pytest.approx((times * 0.02 + 0.02 / 2) / 2)
        assert found[(gate,), size].mean == pytest.approx(-0.1 - 0.02 / 6)
        assert found[(gamma, wide, gate), size].mean == pytest.approx(0.02 / 4)
        assert found[(gamma, gate), size].high - found[(gamma, gate), size].low < 1e-9, "seeds cancel"
    over = found[(gamma, wide), "per doubling of the width"]
    assert over.mean == pytest.approx(0.2 / 2) and over.seeds == 3
    lines = effect_lines(list(found.values()))
    assert any(line.startswith("interaction of init.gamma x norms=as4096, d96: +0.2635 nats") for line in lines)
    assert any(line.startswith("effect of gate, d32: -0.1033") for line in lines)
    assert "differ in non-embedding parameters by up to" in parameter_note(sweep, states)
    # The seeds' own interval: 0.001 per seed.
    one = found[(gamma,), "d96"]
    assert (one.high - one.low) / 2 == pytest.approx(4.303 * 0.001 / 3**0.5, rel=1e-3)


def test_masks_emulate_a_width(masks: tuple[Any, list[Any]]) -> None:
    """The embedding's rms over sqrt(epsilon) is that of width 4096, at either gamma; by method: rms = width^-gamma."""
    _, states = masks
    seen = set()
    for state in states:
        model, gamma, norms = state.point.sized.model, state.point.sized.init.gamma, state.point.labels["norms"]
        ratio = model.hidden_size ** (-2 * gamma) / model.norm_epsilon
        if norms == "as4096":
            assert ratio == pytest.approx(4096 ** (-2 * gamma) / 1e-5)
            seen.add((model.hidden_size, gamma))
        else:
            assert model.norm_epsilon == {"relaxed": 1e-12, "epsilon1e-5": 1e-5}[norms]
    assert len(seen) == 4


def test_incomplete_seeds_are_left_out(masks: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, states = masks

    def partly(state: Any) -> float | None:
        missing = state.point.seed == 3 and state.point.labels["gate"] == "on"
        return None if missing or state.point.labels["size"] != "d96" else loss(state)

    monkeypatch.setattr(module, "final_loss", partly)
    found = effects(sweep, states)
    assert {one.at for one in found} == {"d96"} and {one.seeds for one in found} == {2}
    monkeypatch.setattr(module, "final_loss", lambda state: loss(state) if state.point.seed == 1 else None)
    assert effects(sweep, states) == [], "one seed has no interval"


def test_sweeps_without_a_factorial_have_none(root: Path) -> None:
    assert effects(read_sweep(root / "configs" / "sweeps" / "roles.yaml"), []) == []


def test_contrast() -> None:
    losses = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 4.0, (1, 1): 9.0}
    assert contrast(losses, {0: 1}) == pytest.approx(5.0) and contrast(losses, {1: 1}) == pytest.approx(3.0)
    assert contrast(losses, {0: 1, 1: 1}) == pytest.approx(2.0), "half of (9 - 2) - (4 - 1)"
    # A third value is compared with the first, and averaged over elsewhere.
    losses |= {(0, 2): 3.0, (1, 2): 14.0}
    assert contrast(losses, {1: 2}) == pytest.approx((3 + 14) / 2 - (1 + 4) / 2)
    assert contrast(losses, {0: 1, 1: 2}) == pytest.approx(((14 - 3) - (4 - 1)) / 2)
    assert contrast(losses, {0: 1}) == pytest.approx((4 + 9 + 14) / 3 - (1 + 2 + 3) / 3)
