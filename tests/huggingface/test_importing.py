"""Hugging Face folders come in and go out again to the bit, and train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import TIED, VARIANTS, save_model
from support.ranks import RankPool
from support.train import run_trainer

from megagamma.checkpoint.reader import CheckpointReader
from megagamma.errors import ConfigurationError, MegagammaError
from megagamma.huggingface.export import ExportOptions, export
from megagamma.huggingface.importing import import_model
from megagamma.huggingface.native import ParityInputs, ParityOutputs, parity_outputs

CASES = [
    ("plain", None), ("qk_norm", None), ("elementwise", None), ("elementwise", "qwen3_next"), ("headwise", None),
    ("headwise", "lfm3"), ("gate alone", None), ("head gate alone", None),
]  # fmt: skip


def ask(one_rank: RankPool) -> Any:
    def native(inputs: ParityInputs) -> ParityOutputs:
        return one_rank.run(parity_outputs, inputs)[0]

    return native


@pytest.mark.parametrize(
    ("variant", "hf_class", "tied"),
    [
        *((*case, False) for case in CASES),
        ("elementwise", None, True),
        *(pytest.param(*case, True, marks=pytest.mark.slow) for case in CASES if case != ("elementwise", None)),
    ],
)
def test_there_and_back(
    tmp_path: Path, one_rank: RankPool, data_cache: str, variant: str, hf_class: str | None, tied: bool
) -> None:
    given = ["--data.cache", data_cache, *VARIANTS[variant], *(TIED if tied else [])]
    checkpoint = Path(one_rank.run(save_model, given, str(tmp_path / "run"))[0])
    options = ExportOptions(hf_class=hf_class, custom_code=True)
    first = export(checkpoint, tmp_path / "hf", options, native=ask(one_rank), quiet=True, say=lambda _: None)
    back = import_model(first, tmp_path / "back", quiet=True)
    ours, theirs = CheckpointReader(checkpoint), CheckpointReader(back)
    assert sorted(ours.names()) == sorted(theirs.names())
    for name, tensor in ours.tensors():
        found = theirs.read("weight", name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert not found[520:].any(), "rows that pad the vocabulary come back as zeros"
            found, tensor = found[:520], tensor[:520]
        assert torch.equal(found, tensor), name
    again = export(back, tmp_path / "again", options, native=ask(one_rank), quiet=True, say=lambda _: None)
    before, after = load_file(first / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, again)]
    for config in configs:
        del config["megagamma"]
    assert configs[0] == configs[1]


def public(folder: Path, **changes: Any) -> Path:
    """A Qwen3 folder as transformers writes it, in bf16."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=777, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    if changes:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


def test_a_public_model_comes_in(tmp_path: Path, one_rank: RankPool) -> None:
    """One that this project never saw: its logits by transformers are those of ours, and it goes out as it came."""
    from transformers import AutoModelForCausalLM

    folder = public(tmp_path / "public")
    checkpoint = import_model(folder, tmp_path / "run", quiet=True)
    tokens = torch.arange(60).view(2, 30) * 12
    ours = one_rank.run(parity_outputs, ParityInputs(checkpoint, tokens, tokens[0, :4], 4))[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=tokens).logits
    assert (ours.logits - theirs).abs().max() < 1e-5
    options = ExportOptions(dtype=torch.bfloat16, tokenizer="none")
    again = export(checkpoint, tmp_path / "hf", options, native=ask(one_rank), quiet=True, say=lambda _: None)
    before, after = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    before.pop("lm_head.weight", None)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_place_inside_a_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    for output in (checkpoint / "imported", checkpoint.with_name("step_00000099")):
        with pytest.raises(ConfigurationError, match=r"--out .*: lies in the checkpoint.*: choose another folder"):
            import_model(tmp_path / "source", output, quiet=True)
        assert not output.exists()


def test_an_imported_model_trains_on(tmp_path: Path, one_rank: RankPool, data_cache: str) -> None:
    """Its held-out loss is that of the model it came from, and Adam begins at its first step."""
    source, run = tmp_path / "source", tmp_path / "run"
    shared = ["--data.cache", data_cache, "--model.vocab_size", "512", "--logging.sample_tokens", "0"]
    shared += ["--validation.windows", "0", "--precision.dtype", "fp32"]
    trained = [*shared, "--run.folder", str(source), "--run.steps", "4"]
    assert one_rank.run(run_trainer, trained) == [0]
    checkpoint = source / "checkpoints" / "step_00000004"
    folder = export(checkpoint, tmp_path / "hf", ExportOptions(), native=ask(one_rank), quiet=True, say=lambda _: None)
    import_model(folder, run, quiet=True)
    goes_on = ["--config", str(run / "config.yaml"), "--data.corpus", "tiny", *shared, "--run.folder", str(run)]
    goes_on += ["--data.global_batch_size", "8", "--data.micro_batch_size", "4"]
    # A step at a rate of 0 moves nothing.
    assert one_rank.run(run_trainer, [*goes_on, "--run.steps", "1", "--optimizer.lr", "0"]) == [0]

    def lines(of: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (of / "metrics.jsonl").read_text().splitlines()]

    assert lines(run)[-1]["val/tiny/loss"] == pytest.approx(lines(source)[-1]["val/tiny/loss"], rel=1e-6)
    assert one_rank.run(run_trainer, [*goes_on, "--run.steps", "4", "--optimizer.lr", "1e-3"]) == [0]
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
    # Negative control: steps do move it.
    assert lines(run)[-1]["val/tiny/loss"] != pytest.approx(lines(source)[-1]["val/tiny/loss"], rel=1e-4)
    saved = CheckpointReader(run / "checkpoints" / "step_00000004")
    assert saved.manifest["adam_step"] == 4
    assert saved.kinds == {"weight", "exp_avg", "exp_avg_sq"}


def test_lfm3_as_transformers_writes_it(tmp_path: Path, one_rank: RankPool) -> None:
    """Its gate has another name in files than in the model."""
    import transformers

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.Lfm3Config(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, norm_eps=1e-6, tie_word_embeddings=True,
        layer_types=["full_attention"] * 2, use_sandwich_norm=False, rope_parameters={"full_attention": rope},
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = transformers.Lfm3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "public")
    checkpoint = import_model(tmp_path / "public", tmp_path / "run", quiet=True)
    tokens = torch.arange(60).view(2, 30) * 4
    ours = one_rank.run(parity_outputs, ParityInputs(checkpoint, tokens, tokens[0, :4], 1))[0]
    with torch.no_grad():
        assert (ours.logits - model(input_ids=tokens).logits).abs().max() < 1e-5


def test_buffers_of_older_folders_are_left_out(tmp_path: Path) -> None:
    folder = public(tmp_path / "public")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    assert import_model(folder, tmp_path / "run", quiet=True).exists()


@pytest.mark.parametrize("variant", ["elementwise", "headwise"])
def test_gates_are_told_apart_by_every_layer(tmp_path: Path, one_rank: RankPool, data_cache: str, variant: str) -> None:
    """Gates of a first layer that are all zero look like gates per head."""
    checkpoint = Path(
        one_rank.run(save_model, ["--data.cache", data_cache, *VARIANTS[variant]], str(tmp_path / "run"))[0]
    )
    folder = export(checkpoint, tmp_path / "hf", ExportOptions(), native=ask(one_rank), quiet=True, say=lambda _: None)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"].view(4, 2, 24, -1)[:, 1] = 0
    save_file(tensors, folder / "model.safetensors")
    (folder / "parity.json").unlink()  # it proved other weights
    back = CheckpointReader(import_model(folder, tmp_path / "back", quiet=True))
    assert back.manifest["config"]["model"]["attention_gate"] == variant
    name = "model.layers.2.self_attn.gate_proj.weight"
    assert torch.equal(back.read("weight", name), CheckpointReader(checkpoint).read("weight", name))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures=GPT2LMHeadModel: must be one of LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: must be silu"),
        ({"attention_bias": True}, "attention_bias=True: must be False"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type=yarn: must be default"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "must be full_attention everywhere"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 1, "layer_types": None}, "do not belong together"),
        (
            {"num_hidden_layers": 10**8, "layer_types": None},
            "num_hidden_layers=100000000, and its weights have 2 layers",
        ),
        ({"num_attention_heads": "4"}, "num_attention_heads='4': must be a whole number"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = public(tmp_path / "public", **changes)
    with pytest.raises(ConfigurationError, match=named):
        import_model(folder, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*"))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MegagammaError, match=r"config.json: cannot be read"):
        import_model(tmp_path, tmp_path / "run")
    folder = public(tmp_path / "public")
    with pytest.raises(ConfigurationError, match="exists already"):
        import_model(folder, tmp_path)
    with pytest.raises(ConfigurationError, match="--vocab_size_multiple 0: must be 1 or more"):
        import_model(folder, tmp_path / "run", vocab_size_multiple=0)
    written = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps({**json.loads(written), "hidden_size": None, "architectures": None}))
    with pytest.raises(ConfigurationError, match="architectures=None: must be one of"):
        import_model(folder, tmp_path / "run")
    values = json.loads(written)
    del values["hidden_size"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match="'hidden_size' is missing"):
        import_model(folder, tmp_path / "run")
    (folder / "config.json").write_text("[]")
    with pytest.raises(MegagammaError, match="must be a JSON object, not list"):
        import_model(folder, tmp_path / "run")
    (folder / "config.json").write_text(written)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="weight_map is missing"):
        import_model(folder, tmp_path / "run")
    for other in ("../../secret.safetensors", 3, ["a"]):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": other}}))
        with pytest.raises(ConfigurationError, match="must give names of files in its folder"):
            import_model(folder, tmp_path / "run")
    (folder / "model.safetensors.index.json").unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigurationError, match=r"model.safetensors: cannot be read"):
        import_model(folder, tmp_path / "run")
    save_file({"a": torch.zeros(2)}, weights)
    with pytest.raises(ConfigurationError, match="do not belong together"):
        import_model(folder, tmp_path / "run")
