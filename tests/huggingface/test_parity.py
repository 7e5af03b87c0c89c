"""When a comparison holds, what it compares, and the parts of our side that need no process of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megagamma.config.resolve import resolve
from megagamma.config.schema import Config, ModelConfig, ParallelConfig
from megagamma.huggingface import parity
from megagamma.huggingface.formats import FORMATS
from megagamma.huggingface.native import rounded, single_process
from megagamma.huggingface.parity import Parity, free_memory, needed_bytes, parity_inputs, sampled_layers

HOLDS = Parity("whole model", 96, 1e-6, 1e-5, 1e-4, 16, True, "LlamaForCausalLM", "float32", "5", "2")


def test_a_comparison_that_holds() -> None:
    assert HOLDS.holds and HOLDS.as_json()["holds"] is True
    assert HOLDS.line() == (
        "parity (whole model): largest logit difference 1.0e-06 < 0.0001 over 96 tokens, relative 1.0e-05; greedy "
        "continuation of 16 tokens = ours"
    )
    assert replace(HOLDS, greedy_equal=None).holds, "a single layer writes no text"
    assert "greedy" not in replace(HOLDS, greedy_equal=None).line()


@pytest.mark.parametrize(
    "change",
    [
        {"largest_difference": 1e-4}, {"largest_relative": 1e-4}, {"greedy_equal": False}, {"tolerance": 1e-6},
        {"largest_difference": math.inf},
    ],
    ids=str,
)  # fmt: skip
def test_comparisons_that_do_not_hold(change: dict[str, float]) -> None:
    """Negative controls: each bound alone refuses."""
    found = replace(HOLDS, **change)  # type: ignore[arg-type]
    assert not found.holds and found.as_json()["holds"] is False
    assert " against " in found.line() or "is not ours" in found.line()


def test_sampled_layers() -> None:
    assert [sampled_layers(count) for count in (1, 3, 4, 48)] == [[0], [0, 1, 2], [0, 2, 3], [0, 24, 47]]


def test_inputs_fit_the_context_and_the_memory() -> None:
    def inputs(vocabulary: int, length: int, layer: int | None = None) -> parity.ParityInputs:
        config = replace(Config(), model=ModelConfig(vocab_size=vocabulary))
        config.data.sequence_length = length
        return parity_inputs(config, Path("x"), FORMATS["qwen3_5"], torch.bfloat16, layer, "cpu")

    found = inputs(500, 1024)
    assert found.tokens.shape == (2, 256) and int(found.tokens.min()) >= 0 and int(found.tokens.max()) < 500
    assert found.new_tokens == 16 and found.prompt.equal(found.tokens[0, :8]) and found.norm_offset == 1.0
    assert inputs(500, 48).tokens.shape == (2, 48)
    assert inputs(500, 16).new_tokens == 8, "the continuation fits too"
    assert inputs(1 << 17, 1024).tokens.shape == (2, 32), "logits stay small"
    assert inputs(500, 48, layer=1).new_tokens == 0
    assert inputs(500, 48).tokens.equal(inputs(500, 48).tokens), "the same tokens each time"


def test_memory_is_the_smallest_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_memory("cpu")
    assert 0 < whole < 1 << 50
    limits = {"/sys/fs/cgroup/memory.max": "3000", "/sys/fs/cgroup/memory.current": "1000"}
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *given: limits.get(str(self)) or read(self, *given))
    assert free_memory("cpu") == 2000
    limits["/sys/fs/cgroup/memory.current"] = "4000"
    assert free_memory("cpu") == 0
    limits["/sys/fs/cgroup/memory.max"] = "max"
    assert free_memory("cpu") > 2000
    assert needed_bytes(10**9) > 4 * 10**9


def test_values_are_rounded_as_a_file_rounds_them() -> None:
    values = torch.tensor([1.0 + 2**-9, 0.3, 1.001])
    assert rounded(values, "norm", torch.float32, 1.0) is values
    assert rounded(values, "query", torch.bfloat16, 1.0).equal(values.bfloat16().float())
    # Stored as gain - 1, a gain near 1 keeps far more of its digits.
    stored = rounded(values, "norm", torch.bfloat16, 1.0)
    assert stored.equal((values - 1).bfloat16().float() + 1)
    assert (stored - values).abs()[2] < 1e-5 < (rounded(values, "norm", torch.bfloat16, 0.0) - values).abs()[2]


def test_the_same_model_on_one_process() -> None:
    model = ModelConfig(vocab_size=500, num_layers=4, recompute="full")
    config = resolve(replace(Config(), model=model, parallel=ParallelConfig(tensor=2)))
    alone = single_process(config)
    assert alone.parallel == ParallelConfig() and (alone.model.num_layers, alone.model.recompute) == (4, "none")
    assert single_process(config, layer=2).model.num_layers == 1
    assert (alone.model.hidden_size, alone.model.vocab_size) == (config.model.hidden_size, 500)
    assert (alone.run.device, single_process(config, device="cuda:1").run.device) == ("cpu", "cuda")
