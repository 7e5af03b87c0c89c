"""Effects and interactions of a factorial sweep, planted and found again; and what is left out."""

from __future__ import annotations

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


def loss(state: Any) -> float:
    """Gamma 1 is worse by 0.2, less so with the small epsilon, the gate, and the more the wider: planted per doubling."""
    labels, config = state.point.labels, state.point.sized
    one, relaxed, gate = (
        int(config.init.gamma == 1), int(config.model.norm_epsilon < 1e-9), int(labels["gate"] == "on"),
    )  # fmt: skip
    doublings = {"d128": 0, "d256": 1, "d512": 2}[labels["size"]]
    return (
        5 - 0.4 * doublings + 0.3 * state.point.seed
        + 0.2 * one - 0.05 * relaxed - 0.1 * gate
        - (0.06 + 0.03 * doublings) * one * relaxed - 0.02 * one * relaxed * gate
        + 0.001 * state.point.seed * one
    )  # fmt: skip


def test_planted_effects_are_found(masks: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, states = masks
    monkeypatch.setattr(module, "final_loss", loss)
    found = {(one.axes, one.at): one for one in effects(sweep, states)}
    gamma, epsilon, gate = "init.gamma", "model.norm_epsilon", "gate"
    for size, doublings in (("d128", 0), ("d256", 1), ("d512", 2)):
        both = 0.06 + 0.03 * doublings
        # By hand: a product of factors at 0 and 1 adds half of itself to each of its main effects, and so on.
        assert found[(gamma,), size].mean == pytest.approx(0.2 - both / 2 - 0.02 / 4 + 0.002)
        assert found[(gamma, epsilon), size].mean == pytest.approx(-both / 2 - 0.02 / 4)
        assert found[(gate,), size].mean == pytest.approx(-0.1 - 0.02 / 4)
        assert found[(gamma, epsilon, gate), size].mean == pytest.approx(-0.02 / 4)
        assert found[(epsilon, gate), size].mean == pytest.approx(-0.02 / 4)
        assert found[(gamma, gate), size].high - found[(gamma, gate), size].low < 1e-9, "seeds cancel"
    over = found[(gamma, epsilon), "per doubling of the width"]
    assert over.mean == pytest.approx(-0.03 / 2) and over.seeds == 3
    lines = effect_lines(list(found.values()))
    assert any(line.startswith("interaction of init.gamma x model.norm_epsilon, d512: -0.0650 nats") for line in lines)
    assert any(line.startswith("effect of gate, d128: -0.1050") for line in lines)
    assert "differ in non-embedding parameters by up to" in parameter_note(sweep, states)
    # The seeds' own interval: 0.001 per seed.
    one = found[(gamma,), "d128"]
    assert (one.high - one.low) / 2 == pytest.approx(4.303 * 0.001 / 3**0.5, rel=1e-3)


def test_incomplete_seeds_are_left_out(masks: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, states = masks

    def partly(state: Any) -> float | None:
        missing = state.point.seed == 3 and state.point.labels["gate"] == "on"
        return None if missing or state.point.labels["size"] != "d128" else loss(state)

    monkeypatch.setattr(module, "final_loss", partly)
    found = effects(sweep, states)
    assert {one.at for one in found} == {"d128"} and {one.seeds for one in found} == {2}
    monkeypatch.setattr(module, "final_loss", lambda state: loss(state) if state.point.seed == 1 else None)
    assert effects(sweep, states) == [], "one seed has no interval"


def test_sweeps_without_a_factorial_have_none(root: Path) -> None:
    assert effects(read_sweep(root / "configs" / "sweeps" / "roles.yaml"), []) == []


def test_contrast() -> None:
    losses = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 4.0, (1, 1): 9.0}
    assert contrast(losses, [0]) == pytest.approx(5.0) and contrast(losses, [1]) == pytest.approx(3.0)
    assert contrast(losses, [0, 1]) == pytest.approx(2.0), "half of (9 - 2) - (4 - 1)"
