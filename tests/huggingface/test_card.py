"""The model card, with and without what a run's folder holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from megagamma.config.resolve import resolve
from megagamma.config.schema import Config, DataConfig, InitConfig
from megagamma.huggingface.card import model_card
from megagamma.huggingface.formats import FORMATS
from megagamma.huggingface.parity import Parity

PARITY = Parity("whole model", 96, 1e-6, 1e-5, 1e-4, 16, True, "LlamaForCausalLM", "float32", "5", "2")
PROVENANCE = {"name": "small", "step": 1200, "tokens": 9_999_999, "parameters": 123_456, "seed": 7}


def card(run: Path | None = None, proven: int = 0, key: str = "llama", **init: object) -> str:
    config = replace(Config(), init=InitConfig(**init), data=DataConfig(paths=["x/books", "y/web"]))  # type: ignore[arg-type]
    return model_card(resolve(config), PROVENANCE, FORMATS[key], PARITY, proven, run)


def test_what_every_card_holds() -> None:
    text = card(gamma=0.75, exponents={"embedding": 0.5})
    assert text.startswith("---\nlibrary_name: transformers\n") and text.count("\n---\n") == 1
    assert "# small, step 1,200" in text and "123,456 parameters" in text and "on 9,999,999 tokens" in text
    assert "std = d_in^-gamma, gamma 0.75, but embedding 0.5; normal distribution" in text.replace(
        "truncated_normal", "normal"
    )
    assert "seed 7" in text and "- data: books, web" in text and PARITY.line() in text
    assert "tokenizer" not in text and "trust_remote_code" not in text and "target std" not in text


def test_a_tokenizer_and_code_of_our_own() -> None:
    assert "AutoTokenizer" in card(proven=1000) and "same ids as the SentencePiece model on 1,000 texts" in card(
        proven=1000
    )
    assert "trust_remote_code=True" in card(key="gated_llama")


def test_files_of_the_run(tmp_path: Path) -> None:
    report = {"roles": [{"role": "query", "asked_std": 0.015625, "measured_std": 0.0156}]}
    (tmp_path / "init_report.json").write_text(json.dumps(report))
    started = {"started": "today", "git_commit": "a" * 40, "git_changed": True, "python": "3.12"}
    layout = {
        "layout": {"world": 4, "tensor": 2, "pipeline": 2, "data": 1},
        "packages": {"torch": "2.9", "wandb": None},
    }
    (tmp_path / "provenance.json").write_text(json.dumps({**started, **layout}))
    text = card(tmp_path)
    assert "| role | target std | measured std |\n|---|---|---|\n| query | 1.5625e-02 | 1.5600e-02 |" in text
    assert "- started today, source aaaaaaaaaaaa with uncommitted changes" in text
    assert "- 4 processes: tensor 2, pipeline 2, data 1" in text and "- Python 3.12, torch 2.9\n" in text
    # A card can do without files that are missing or corrupt.
    for name in ("init_report.json", "provenance.json"):
        (tmp_path / name).write_text("{")
    assert card(tmp_path) == card(None)
