"""How a Hugging Face model was drawn, from its files: the numbers of the loaded model, in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import megagamma
from megagamma.commands import inspect_init
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.huggingface.drawn import report_of
from megagamma.initialization import report as reporting

SHAPE = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 160, "vocab_size": 300, "n_positions": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, whose tensors are fused and (in, out), in several files."""
    found = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(1)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE)).save_pretrained(found, max_shard_size="100KB")
    assert len(list(found.glob("*.safetensors"))) > 2
    return found


def stds(report: Any) -> dict[str, float]:
    return {row.name: row.measured_std for row in report.matrices}


def test_files_and_model_give_one_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = megagamma.initialize(transformers.GPT2LMHeadModel.from_pretrained(folder), dry_run=True)
    monkeypatch.setattr(reporting, "_CHUNK", 1000)  # many pieces
    found = report_of(folder, {})
    assert stds(found).keys() == stds(loaded).keys() and len(stds(found)) == 14
    assert stds(found) == pytest.approx(stds(loaded), rel=1e-12)
    assert "today's weights" in str(found)
    # transformers divides what writes to the residual stream by sqrt(2 layers).
    rows = {row.role: row.measured_std for row in found.roles}
    assert rows["mlp_up"] == pytest.approx(0.02, rel=0.05) and rows["mlp_down"] == pytest.approx(0.01, rel=0.05)


def test_experts_of_files_and_of_memory(tmp_path: Path) -> None:
    """transformers stacks experts in memory and writes them one by one."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=50,
        intermediate_size=48, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    found, loaded = report_of(tmp_path, {}), megagamma.initialize(model, dry_run=True)
    assert "model.layers.0.mlp.experts.2.down_proj.weight" in stds(found)
    assert stds(found) == pytest.approx(stds(loaded), rel=1e-12)


def test_a_config_has_targets_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_init.main(["--model", str(folder / "config.json"), "--init.gamma", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "Nothing is measured" in out and "1.2500e-01" in out, "64^-0.5"


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "init.json"
    words = [f"--model={folder}", "--tensor-level", "--json", str(output), "--role", "*.wpe.weight=keep"]
    assert inspect_init.main(words) == 0
    assert "model.layers.1.mlp.down_proj.weight" in capsys.readouterr().out
    values = json.loads(output.read_text())
    assert values["drawn"] is False and "transformer.wpe.weight" in values["kept"]
    assert "position" not in {row["role"] for row in values["roles"]}


def test_llama_of_an_older_file(tmp_path: Path) -> None:
    """A tied head that is written all the same counts once, and a buffer is no weight."""
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.extra"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    report = report_of(tmp_path, {})
    assert [row.role for row in report.roles].count("embedding") == 1 and "head" not in {r.role for r in report.roles}
    assert report.kept == {"model.extra": "has no role"}


def without_weights(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").touch()


def quantized(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')


def unknown(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    unknown(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-3])


BAD = [
    (lambda folder: None, r"config\.json: cannot be read"),
    (without_weights, r"has no safetensors files \(it has config\.json, pytorch_model\.bin\)"),
    (quantized, r"is quantized \(gptq\)"),
    (unknown, "model_type='mamba' has no table of roles"),
    (cut, r"model\.safetensors: cannot be read"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_folders(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    with pytest.raises(MegagammaError, match=message):
        report_of(tmp_path, {})


def test_bad_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="must be a folder"):
        inspect_init.main(["--model", str(tmp_path / "missing")])
    with pytest.raises(ConfigurationError, match="must be PATTERN=ROLE"):
        inspect_init.main(["--model", str(tmp_path), "--role", "query"])
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ConfigurationError, match="cannot build model_type='no such'"):
        inspect_init.main(["--model", str(tmp_path / "config.json")])
