"""The text of any step's batch of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megagamma.config.io import load_config
from megagamma.data.schedule import batch_size, samples_before, total_steps
from megagamma.data.sources import open_data
from megagamma.data.text_batches import TextSource
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError


def inspect_batch(source: TextSource, ids: Sequence[int]) -> list[tuple[int, str, str]]:
    """(sample id, corpus name, decoded text) of samples; an eos shows as "<|eos|>"."""
    tokenizer = Tokenizer(source.tokenizer_path)
    found = []
    for index in ids:
        sampler = source.blend.samplers[source.blend.locate(index)[0]]
        tokens = source.blend[index]
        pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id))
        texts = [tokenizer.decode(piece[piece != tokenizer.eos_id]) for piece in pieces]
        found.append((int(index), sampler.name, "<|eos|>".join(texts)))
    return found


def print_batch(config_path: str, step: int, rows: int) -> None:
    """Print the decoded text of a step's first `rows` samples.

    Args:
        config_path: a run's config.yaml, or any config file.
        step: from 1 to the run's last.
        rows: samples shown; 0 shows all.

    Raises:
        ConfigurationError: the run has no such step.
    """
    config = load_config(config_path)
    steps = total_steps(config)
    if not 1 <= step <= steps:
        raise ConfigurationError(f"--step {step}: the run has steps 1 to {steps}")
    if config.data.toy:
        raise ConfigurationError(
            f"{config_path}: data.toy={config.data.toy} is no text: docs/toys.md says what its questions are"
        )
    data = open_data(config)
    first = samples_before(config.data, step - 1)
    size = batch_size(config.data, first)
    if not isinstance(data.train, TextSource):
        raise ConfigurationError(f"{config_path}: its training data is no text")
    print(f"step {step}: samples {first} to {first + size - 1}")
    for number, corpus, text in inspect_batch(data.train, range(first, first + min(rows or size, size))):
        print(f"--- sample {number} of {corpus}\n{text}")
