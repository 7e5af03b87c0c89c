"""Small benchmarks in the layout of the hub, and a small Hugging Face model, all made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OWN = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: NAME.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metadata: {version: 7}
"""
HEADER = """---
license: cc-by-sa-4.0
configs:
- config_name: ARC-Challenge
  data_files:
  - split: train
    path: ARC-Challenge/train-*
  - split: validation
    path: ARC-Challenge/validation-*
  - split: test
    path: ARC-Challenge/test-*
- config_name: ARC-Easy
  data_files:
  - split: train
    path: ARC-Easy/train-*
  - split: validation
    path: ARC-Easy/validation-*
  - split: test
    path: ARC-Easy/test-*
---
# ARC
"""
WORDS = ["water", "iron", "the sun", "plants", "a river", "cold air", "two magnets", "grüner Sand"]


def arc(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions as ai2_arc has them, with three, four or five choices."""
    found = []
    for number in range(count):
        size = 3 + (number + seed) % 3
        choices = [WORDS[(number * 3 + seed + index) % len(WORDS)] for index in range(size)]
        found.append(
            {
                "id": f"q{seed}_{number}",
                "question": f"Which of these is thing {number * 7 + seed}?",
                "choices": {"text": choices, "label": list("ABCDE")[:size]},
                "answerKey": "ABCDE"[(number * 5 + seed) % size],
            }
        )
    return found


def write_own_task(folder: Path, name: str, count: int) -> None:
    """A task of one's own with `count` questions."""
    (folder / f"{name}.yaml").write_text(OWN.replace("NAME", name))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in arc(count, 2)))


def gsm8k(count: int, seed: int) -> list[dict[str, str]]:
    """Problems as gsm8k has them."""
    return [
        {
            "question": f"Tom has {n} pens and buys {seed} more. How many?",
            "answer": f"{n}+{seed}={n + seed}\n#### {n + seed}",
        }
        for n in range(count)
    ]


def make_mirror(root: Path) -> Path:
    """A mirror with ai2_arc (parquet, configs in the README's header) and gsm8k (JSON lines in a folder per config)."""
    import pyarrow
    import pyarrow.parquet

    folder = root / "allenai" / "ai2_arc"
    for config, count in (("ARC-Easy", 12), ("ARC-Challenge", 9)):
        (folder / config).mkdir(parents=True)
        for seed, split in enumerate(("train", "validation", "test")):
            table = pyarrow.Table.from_pylist(arc(count, seed))
            pyarrow.parquet.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(HEADER)
    folder = root / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train", "test"), 1):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in gsm8k(6, seed)))
    return root


def make_others(root: Path) -> Path:
    """A question of each other set that the presets read, in the fields that the stock tasks expect."""
    siqa = {"context": "Tom fell.", "question": "How is Tom?", "answerA": "hurt", "answerB": "glad", "answerC": "rich"}
    swag = {
        "ind": 4, "activity_label": "Cooking", "ctx_a": "A man stirs.", "ctx_b": "he", "ctx": "A man stirs. he",
        "endings": ["eats.", "flies [step] away.", "sings.", "melts."], "source_id": "x", "split": "val",
        "split_type": "indomain",
    }  # fmt: skip
    math = {"problem": "What is $2+2$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{4}$."}
    mmlu = {"question": "Which is a bone?", "subject": "anatomy", "choices": ["rib", "tin", "sea", "sky"], "answer": 0}
    trivia = {
        "question": "Which river runs through Cairo?",
        "answer": {"aliases": ["Nile", "the Nile"], "value": "Nile"},
    }
    sets = {
        "SaylorTwift/bbh/boolean_expressions": (["test"], {"input": "not ( True ) is", "target": "False"}),
        "EleutherAI/hendrycks_math/algebra": (["train", "test"], math),
        "cais/mmlu/anatomy": (["test", "validation", "dev"], mmlu),
        "Rowan/hellaswag": (["train", "validation"], {**swag, "label": "1"}),
        "lighteval/siqa": (["train", "validation"], {**siqa, "label": "2"}),
        "mandarjoshi/trivia_qa/rc.nocontext": (["train", "validation"], trivia),
    }
    for name, (splits, row) in sets.items():
        (root / name).mkdir(parents=True)
        for split in splits:
            (root / name / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    # Without a header `datasets` takes dev for another name of validation.
    files = "".join(f"\n  - split: {split}\n    path: anatomy/{split}.jsonl" for split in ("test", "validation", "dev"))
    header = f"---\nconfigs:\n- config_name: anatomy\n  data_files:{files}\n---\n"
    (root / "cais" / "mmlu" / "README.md").write_text(header)
    return root


def byte_tokenizer() -> Any:
    """A Hugging Face tokenizer of bytes and a few merges, about 290 tokens; the same on every call."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<eos>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(["Which of these is the thing? Answer: water", "Question: How many pens?"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


class AsOurs:
    """A Hugging Face tokenizer with the methods of ours."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_id, self.vocab_size = tokenizer.eos_token_id, len(tokenizer)

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return found

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def make_model(folder: Path, window: int = 512, seed: int = 0) -> Path:
    """A random Llama with its tokenizer, saved as a Hugging Face folder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=window, initializer_range=0.3, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
