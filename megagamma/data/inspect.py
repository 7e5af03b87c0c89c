"""Shows the text of any step's batch of a run."""

from __future__ import annotations

from megagamma.config.io import load_config
from megagamma.data.batches import inspect_batch
from megagamma.data.schedule import batch_size, samples_before, total_steps
from megagamma.data.sources import open_data
from megagamma.errors import ConfigurationError


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
    data = open_data(config)
    first = samples_before(config.data, step - 1)
    size = batch_size(config.data, first)
    print(f"step {step}: samples {first} to {first + size - 1}")
    for number, corpus, text in inspect_batch(data.train, range(first, first + min(rows or size, size))):
        print(f"--- sample {number} of {corpus}\n{text}")
