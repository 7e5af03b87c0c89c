"""A local benchmark of any prepared data: which of four texts continues from here?

Needs no download. Three wrong texts are cut from other places of the same held-out documents, so that only what stands
before distinguishes the right one. Chance is 1/4.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from megagamma.data.text import Corpus
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import DataError
from megagamma.files import write_text

NAME = "continuation"
_YAML = """# Which of four texts continues from here? Written by megagamma.evaluation.continuation.
task: continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: continuation.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata:
  version: 1
"""


def is_own_task(content: bytes) -> bool:
    """Whether a file is, to the byte, the task that `write_continuation` writes."""
    return content == _YAML.encode()


def _words(text: str, start: int, count: int) -> tuple[str, int]:
    """`count` words from the first one that begins at or after `start`, with the space before them; where they end."""
    start = text.index(" ", start)
    end = start
    for _ in range(count):
        end = text.index(" ", end + 1)
    return text[start:end], end


def write_continuation(
    prepared: Path, folder: Path, count: int = 100, context_words: int = 40, choice_words: int = 6, seed: int = 0
) -> Path:
    """Write an lm-eval task and its questions, drawn from the validation split of a prepared folder.

    Args:
        prepared: folder that tools/prepare_data.py wrote.
        folder: gets continuation.yaml and continuation.jsonl.
        count: questions.
        context_words, choice_words: length of what is shown and of what is to be chosen.

    Raises:
        DataError: the folder has too little held-out text.
    """
    corpus, tokenizer = Corpus(prepared, "validation"), Tokenizer(prepared / "tokenizer.model")
    lengths = corpus.document_lengths
    documents = [
        " ".join(tokenizer.decode(corpus.read(index, 0, int(lengths[index]))).split()) for index in range(len(lengths))
    ]
    shortest = 12 * (context_words + 2 * choice_words)
    documents = [text for text in documents if len(text) > 2 * shortest]
    if not documents:
        raise DataError(f"{prepared}: its validation split has no document of {2 * shortest} characters")
    rng = random.Random(seed)

    def place() -> tuple[str, int]:
        text = rng.choice(documents)
        return text, rng.randrange(len(text) - shortest)

    lines: list[dict[str, object]] = []
    for _ in range(200 * count):
        if len(lines) == count:
            break
        text, start = place()
        try:
            context, end = _words(text, start, context_words)
            choices = [_words(text, end, choice_words)[0]]
            choices += [_words(*place(), choice_words)[0] for _ in range(3)]
        except ValueError:  # a document that ends first
            continue
        if len(set(choices)) < 4:
            continue
        order = rng.sample(range(4), 4)
        shuffled = [choices[index] for index in order]
        lines.append({"context": context.strip(), "choices": shuffled, "label": order.index(0)})
    if len(lines) < count:
        raise DataError(f"{prepared}: its held-out text gives {len(lines)} of {count} questions: it has too few spaces")
    write_text(folder / f"{NAME}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text(folder / f"{NAME}.yaml", _YAML)
    return folder
