"""A folder loads in transformers 4.57 with the same logits, for the classes that exist there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.exports import VARIANTS, save_model
from support.ranks import RankPool

from megagamma.huggingface.export import ExportOptions, export
from megagamma.huggingface.native import parity_outputs
from megagamma.huggingface.parity import exported_model

# What transformers 4.57 wants of packages that have moved on since; everything else it finds here.
OLD = ["transformers>=4.57,<4.58", "huggingface_hub<1", "tokenizers<0.23"]
LOAD = """
import sys, torch, transformers
from safetensors.torch import save_file
assert transformers.__version__.startswith("4.57"), transformers.__version__
found, tokens = {}, torch.arange(60).view(2, 30) * 8
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code="gated" in folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found[folder] = model.eval()(input_ids=tokens).logits.detach().contiguous()
    found[folder + "/ids"] = torch.tensor(tokenizer("The people  of 1789,\\n\\tna\\u00efve \\u2581 <|eos|>")["input_ids"])
save_file(found, sys.argv[1])
"""
CASES = {
    "plain": "llama",
    "qk_norm": "qwen3",
    "elementwise": "qwen3_next",
    "headwise": "qwen3_next",
    "gate alone": "gated_llama",
}


@pytest.fixture(scope="module")
def old_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57, to be put before the environment's own packages."""
    folder = tmp_path_factory.mktemp("old")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLD]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.launcher
def test_the_same_logits_and_ids(tmp_path: Path, old_packages: Path, one_rank: RankPool, data_cache: str) -> None:
    folders = {}
    for variant, hf_class in CASES.items():
        checkpoint = Path(
            one_rank.run(save_model, ["--data.cache", data_cache, *VARIANTS[variant]], str(tmp_path / variant))[0]
        )
        options = ExportOptions(hf_class=hf_class, custom_code=True)
        output = tmp_path / f"{variant.replace(' ', '_')}-{hf_class}"
        folders[variant] = export(
            checkpoint, output, options, quiet=True, say=lambda _: None,
            native=lambda inputs: one_rank.run(parity_outputs, inputs)[0],
        )  # fmt: skip
    out = tmp_path / "found.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(out), *map(str, folders.values())], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(old_packages), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    old = load_file(out)
    tokens = torch.arange(60).view(2, 30) * 8
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folders["plain"])("The people  of 1789,\n\tnaïve \u2581 <|eos|>")["input_ids"]
    for variant, folder in folders.items():
        with torch.no_grad():
            new = exported_model(folder, trust=variant == "gate alone")(input_ids=tokens).logits
        assert (old[str(folder)] - new).abs().max() < 1e-5, variant
        assert old[f"{folder}/ids"].tolist() == ids
    # Negative control: two variants differ by far more.
    assert (old[str(folders["plain"])] - old[str(folders["qk_norm"])]).abs().max() > 1e-2
