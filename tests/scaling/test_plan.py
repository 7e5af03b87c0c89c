"""Plans: costs against their formulas, what arms differ in, warnings; and the presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import write

from megagamma.commands import sweep as command
from megagamma.errors import ConfigurationError
from megagamma.planning.flops import known_peak_flops
from megagamma.scaling.plan import Speed, make_plan, speed_of
from megagamma.scaling.points import expand
from megagamma.scaling.spec import read_sweep

SPEED = Speed(1e12, "stated", "cuda")


def plan_of(path: Path, budgets: tuple[float, ...] | None = None) -> dict[str, Any]:
    sweep = read_sweep(path, budgets)
    return make_plan(sweep, expand(sweep, Path("points")), [], SPEED, False)


def test_costs(tmp_path: Path) -> None:
    """Against numbers counted by hand: 4 layers of width 64, 4 heads of 16, SwiGLU 192, elementwise gate, 512 tokens."""
    values = plan_of(write(tmp_path, axes={"size": {"d64": {"model.hidden_size": 64}}, "init.gamma": [0.5, 1.0]}))
    row = values["rows"][0]
    layer = 5 * 64 * 64 + 3 * 64 * 192 + 2 * 64 + 2 * 16
    assert row["non_embedding"] == 4 * layer + 64
    assert row["parameters"] == row["non_embedding"] + 2 * 512 * 64
    tokens = 20 * 8 * 64
    matrices = 4 * (5 * 64 * 64 + 3 * 64 * 192) + 512 * 64
    assert row["flops"] == tokens * (6 * matrices + 6 * 4 * 64 * 64)
    assert row["seconds"] == row["flops"] / 1e12
    assert row["disk_bytes"] == 12 * row["parameters"]
    assert values["total"]["flops"] == 4 * row["flops"]
    assert values["points"] == 4


def test_what_arms_differ_in(tmp_path: Path) -> None:
    fair = plan_of(write(tmp_path))
    assert "arms init.gamma: differ in init.gamma; they share seed, data order" in fair["comparison"][0]
    assert not any("differs between arms too" in text for text in fair["warnings"])
    assert any("learning rate: untuned" in line for line in fair["comparison"])
    rule = {"rule": "constant", "value": 0.002, "arms": {"init.gamma": {0.5: {"value": 0.004}}}}
    unfair = plan_of(write(tmp_path, rules={"optimizer.lr": rule}))
    (warning,) = [text for text in unfair["warnings"] if "differs between arms too" in text]
    assert warning.startswith("optimizer.lr differs between arms too")
    # A gate adds weights, and with them tokens.
    rules = {"run.tokens": {"rule": "per_parameter", "tokens": 1}}
    axes = {
        "gate": {"off": {"model.attention_gate": "none"}, "on": {}},
        "optimizer.lr": {"values": [0.1, 0.2], "tuned": True},
    }
    unfair = plan_of(write(tmp_path, rules=rules, axes=axes))
    assert any(text.startswith("run.tokens differs between arms too") for text in unfair["warnings"])
    assert any(
        "learning rate: tuned per arm and size over the values 0.1, 0.2" in line for line in unfair["comparison"]
    )


def test_an_entry_of_a_mapping_is_the_option_of_its_axis(tmp_path: Path) -> None:
    """It is what the arms are meant to differ in; an entry of another mapping that an arm sets alone is not."""
    for axis, option in (("optimizer.lr_factors.head", "optimizer.lr_factors"), ("init.query", "init.exponents")):
        values = plan_of(write(tmp_path, axes={axis: [0.5, 1.0]}, rules={}))
        assert f"differ in {option};" in values["comparison"][0]
        assert not any("differs between arms too" in text for text in values["warnings"])
    rule = {"rule": "constant", "value": 0.5, "arms": {"init.gamma": {0.5: {"value": 0.8}}}}
    values = plan_of(write(tmp_path, axes={"init.gamma": [0.5, 1.0]}, rules={"init.query": rule}))
    assert any(text.startswith("init.exponents differs between arms too") for text in values["warnings"])


def test_isoflop_grids_are_wide_and_centred(tmp_path: Path) -> None:
    sizes = {f"d{width}": {"model.hidden_size": width} for width in (32, 48, 64, 96)}
    axes = {"size": sizes}
    path = write(tmp_path, axes=axes, rules={})
    # 20 tokens per weight need about 120 N^2 FLOPs: between the second and the third size at 7e12.
    assert plan_of(path, (7e12,))["warnings"] == [
        "2 seeds: differences will have wide intervals: use 3 or more for a finding"
    ]
    low, high = plan_of(path, (1e11,))["warnings"][0], plan_of(path, (1e15,))["warnings"][0]
    assert "add smaller sizes" in low and "add larger sizes" in high


def test_speeds() -> None:
    peak = known_peak_flops("H100")
    assert peak is not None
    assert speed_of([], "H100", 0.5, False).flops_per_second == peak / 2
    assert "assumed" in speed_of([], "H100", None, False).source
    here = speed_of([], "", None, False)
    assert here.device == "cpu" and "measured in fp32" in here.source
    for device, mfu, message in (
        ("H1000", 0.4, "peak is not known"),
        ("H100", 1.5, "--mfu 1.5"),
        ("", None, "name the GPU"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            speed_of([], device, mfu, True)


PRESETS = {
    "smoke": 8, "scale": 72, "masks": 72, "roles": 69, "cluster_scale": 28, "precision": 20, "dynamics": 9,
    "toys": 25, "learning_rate": 11, "learning_rate_fresh": 9, "learning_rate_short": 12,
    "scale_small": 64,
}  # fmt: skip


def test_all_presets_are_here(root: Path) -> None:
    assert {path.stem for path in (root / "configs" / "sweeps").glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_compare_fairly(name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "configs" / "sweeps" / f"{name}.yaml"
    assert command.main(["plan", str(path), "--state", str(tmp_path / "new"), "--device", "H100", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["points"] == PRESETS[name]
    unfair = [text.split()[0] for text in values["warnings"] if "differs between arms too" in text]
    # Each arm at the rate that did best for it in another sweep.
    assert unfair == (["optimizer.lr"] if name in ("scale_small", "masks") else [])
    assert values["total"]["device_hours"] > 0
    assert not (tmp_path / "new").exists()  # a plan writes nothing


def test_a_point_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, set={"parallel.memory_gib": 0.01})
    with pytest.raises(ConfigurationError, match=r"point d32-gamma0\.5-seed1: parallel\.memory_gib=0\.01"):
        plan_of(path)


def test_the_plan_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command.main(
            ["plan", str(write(tmp_path)), "--state", str(tmp_path / "new"), "--device", "H100", "--mfu", "0.4"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    for text in (
        "sweep study: 8 points, 0 finished",
        "d64-gamma1",
        "GPU-hours",
        "40% MFU (stated) of H100",
        "optimizer.lr: power(",
    ):
        assert text in printed
