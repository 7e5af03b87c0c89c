"""Shards of flattened tensors: together they are the tensor, and what pads the last one is zero."""

from __future__ import annotations

import math

import pytest
import torch
from support.ranks import RankPool
from support.train import build_engine

from megagamma.distributed.state import _shard
from megagamma.model.parameters import KINDS


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(12,), (3, 5), (1,), (7, 1, 3)])
def test_shards_are_the_tensor_and_zeros(shape: tuple[int, ...], ranks: int) -> None:
    whole = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    size = -(-whole.numel() // ranks)
    shards = [_shard(whole, size, rank) for rank in range(ranks)]
    assert {shard.shape for shard in shards} == {(size,)}
    joined = torch.cat(shards)
    assert torch.equal(joined[: whole.numel()], whole.view(-1))
    assert not joined[whole.numel() :].any()


def test_a_shard_wider_than_the_rest_is_padded() -> None:
    """DeepSpeed aligns partitions; a rank can lie wholly past the end."""
    whole = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert _shard(whole, 4, 0).tolist() == [1, 2, 3, 4]
    assert _shard(whole, 4, 1).tolist() == [5, 6, 0, 0]
    assert _shard(whole, 4, 2).tolist() == [0, 0, 0, 0]
    # Not contiguous: flattened in logical order.
    assert _shard(whole.t(), 4, 0).tolist() == [1, 3, 5, 2]


def set_and_get(arguments: list[str]) -> list[str]:
    """Write every tensor of every kind and read it back; returns what differs."""
    _, engine = build_engine(arguments)
    wrong = []
    values = {}
    for number, tensor in enumerate(engine.map):
        for offset, kind in enumerate(KINDS):
            generator = torch.Generator().manual_seed(3 * number + offset)
            value = torch.rand(tensor.shape, generator=generator)
            values[tensor.name, kind] = value
            engine.state.set(tensor, kind, value)
    engine.state.step = 17
    for tensor in engine.map:
        for kind in KINDS:
            if not torch.equal(engine.state.get(tensor, kind), values[tensor.name, kind]):
                wrong.append(f"{kind} {tensor.name}")
    if engine.state.step != 17:
        wrong.append("step")
    engine.close()
    return wrong


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_set_is_got(two_ranks: RankPool, data_cache: str, stage: int) -> None:
    given = ["--data.cache", data_cache, "--deepspeed_config", f"configs/deepspeed/zero{stage}.json"]
    # Sizes that two ranks do not share evenly, so that last shards are padded.
    given += ["--model.head_dim", "14", "--model.ffn_hidden_size", "75", "--model.hidden_size", "60"]
    assert two_ranks.run(set_and_get, given) == [[], []]
