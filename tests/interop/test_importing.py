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

from megagamma.errors import ConfigurationError
from megagamma.interop.export import ExportOptions, export
from megagamma.interop.importing import import_model
from megagamma.interop.native import Answer, Question, answer
from megagamma.training.reading import CheckpointReader

CASES = [
    ("plain", None), ("qk_norm", None), ("elementwise", None), ("elementwise", "qwen3_next"), ("headwise", None),
    ("headwise", "lfm3"), ("gate alone", None), ("head gate alone", None),
]  # fmt: skip


def ask(one_rank: RankPool) -> Any:
    def native(question: Question) -> Answer:
        return one_rank.run(answer, question)[0]

    return native


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("variant", "hf_class"), CASES)
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
    ours = one_rank.run(answer, Question(checkpoint, tokens, tokens[0, :4], 4))[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=tokens).logits
    assert (ours.logits - theirs).abs().max() < 1e-5
    options = ExportOptions(dtype=torch.bfloat16, tokenizer="none")
    again = export(checkpoint, tmp_path / "hf", options, native=ask(one_rank), quiet=True, say=lambda _: None)
    before, after = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    before.pop("lm_head.weight", None)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_imported_model_trains_on(tmp_path: Path, one_rank: RankPool, data_cache: str) -> None:
    """Its first loss is that of the model it came from, and Adam begins at its first step."""
    source, run = tmp_path / "source", tmp_path / "run"
    shared = [
        *(
            "--data.cache",
            data_cache,
            "--model.vocab_size",
            "512",
            "--validation.interval",
            "0",
            "--optimizer.lr",
            "1e-3",
        ),
        *("--checkpoint.save_initial", "true", "--logging.sample_tokens", "0"),
    ]
    trained = [*shared, "--run.folder", str(source), "--run.steps", "4", "--schedule.min_lr_ratio", "1"]
    assert one_rank.run(run_trainer, trained) == [0]
    checkpoint = source / "checkpoints" / "step_00000004"
    folder = export(checkpoint, tmp_path / "hf", ExportOptions(), native=ask(one_rank), quiet=True, say=lambda _: None)
    import_model(folder, run, quiet=True)
    # The same window of text as its first batch.
    config = ["--config", str(run / "config.yaml"), "--data.corpus", "tiny"]
    goes_on = [*config, *shared, "--data.global_batch_size", "8", "--data.micro_batch_size", "4"]
    goes_on += ["--run.folder", str(run), "--run.steps", "3"]
    assert one_rank.run(run_trainer, goes_on) == [0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in (source / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    # Not the loss of a model that was just drawn.
    assert lines[0]["loss"] < first[0]["loss"] - 0.1
    saved = CheckpointReader(run / "checkpoints" / "step_00000003")
    assert saved.manifest["adam_step"] == 3
    assert saved.kinds == {"weight", "exp_avg", "exp_avg_sq"}


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
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = public(tmp_path / "public", **changes)
    with pytest.raises(ConfigurationError, match=named):
        import_model(folder, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*"))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config.json: cannot be read"):
        import_model(tmp_path, tmp_path / "run")
    folder = public(tmp_path / "public")
    with pytest.raises(ConfigurationError, match="exists already"):
        import_model(folder, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigurationError, match=r"model.safetensors: cannot be read"):
        import_model(folder, tmp_path / "run")
    save_file({"a": torch.zeros(2)}, weights)
    with pytest.raises(ConfigurationError, match="do not belong together"):
        import_model(folder, tmp_path / "run")
