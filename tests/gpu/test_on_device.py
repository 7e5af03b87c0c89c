"""What must hold on a GPU. `make test-all` runs the same code on the CPU, so that the checks themselves are known to work.

`megagamma gpu_check` runs the half that needs a GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megagamma.runs.folder import RunFolder

HERE = Path(__file__).resolve().parent
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
    ),
]
pytestmark = pytest.mark.launcher


def run(root: Path, *words: str) -> str:
    """Standard output of a Python program, which must end well."""
    found = subprocess.run(
        [sys.executable, *words], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.fixture(scope="module", params=DEVICES)
def measured(request: pytest.FixtureRequest, root: Path, data_cache: str) -> dict[str, Any]:
    """What tests/gpu/on_device.py found."""
    output = run(root, str(HERE / "on_device.py"), request.param, data_cache)
    return {"device": request.param, **json.loads(output.splitlines()[-1])}


def test_steps_in_bf16_and_every_way_to_save_memory(measured: dict[str, Any]) -> None:
    """Losses and gradient norms of three steps: bf16 near fp32, and ZeRO, recomputation and offload near bf16."""
    losses = measured["losses"]
    assert all(math.isfinite(value) for steps in losses.values() for step in steps for value in step)
    for name in losses:
        if name.startswith("bf16"):
            for found, expected in zip(losses[name], losses["fp32"], strict=True):
                assert found == pytest.approx(expected, rel=2e-2), name
    # Negative control: weights of another scale are further away than that.
    for found, expected in zip(losses["fp32, drawn larger"], losses["fp32"], strict=True):
        assert found != pytest.approx(expected, rel=2e-2)


def test_the_worlds_backend(measured: dict[str, Any]) -> None:
    expected = "nccl" if measured["device"] == "cuda" else "gloo"
    assert measured["backend"] == {"name": expected, "sum": [2.0] * 3}


def test_flash_attention_is_chosen(measured: dict[str, Any]) -> None:
    operator = "aten::_scaled_dot_product_flash_attention" + ("_for_cpu" if measured["device"] == "cpu" else "")
    assert operator in measured["kernels"]
    # Negative control: on a GPU flash attention takes no mask.
    assert measured["device"] == "cpu" or operator not in measured["masked kernels"]


def test_a_compiled_model_is_the_model(measured: dict[str, Any]) -> None:
    found = measured["compiled"]
    assert found["compiled"] == pytest.approx(found["eager"], rel=1e-4)
    assert found["compiled gradient"] == pytest.approx(found["eager gradient"], rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_saves_resumes_and_exports(device: str, root: Path, data_cache: str, tmp_path: Path) -> None:
    arguments = [
        "megagamma/pretrain.py", "--config", "configs/smoke.yaml", "--data.cache", data_cache,
        "--run.device", device, "--precision.dtype", "bf16", "--run.deterministic", "true",
        "--schedule.shape", "constant", "--schedule.warmup_steps", "0", "--validation.at_end", "false",
        "--validation.interval", "0", "--logging.sample_tokens", "0",
    ]  # fmt: skip
    losses = {}
    for name, ends in (("whole", ["4"]), ("resumed", ["2", "4"])):
        folder = tmp_path / name
        for end in ends:
            run(root, *arguments, "--run.folder", str(folder), "--run.steps", end)
        rows = {row["step"]: row["loss"] for row in RunFolder(folder).metrics().read()}
        losses[name] = [rows[step] for step in range(1, 5)]
    resolved = json.loads((tmp_path / "whole" / "resolved.json").read_text())
    assert (resolved["device"], resolved["dtype"]) == (device, "bfloat16")
    assert losses["resumed"] == pytest.approx(losses["whole"], rel=1e-3 if device == "cuda" else 0)
    assert len(set(losses["whole"])) == 4, "it trains"
    run(
        root, "tools/convert_and_eval.py", str(tmp_path / "whole"), "--convert_only", "--out", str(tmp_path / "hf"),
        "--device", device,
    )  # fmt: skip
    assert (tmp_path / "hf" / "config.json").exists(), "published, so its logits are equal"
