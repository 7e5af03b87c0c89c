"""The slow rank is found."""

from __future__ import annotations

import time
from typing import Any

from support.ranks import RankPool
from support.train import batches, build_engine

from megagamma.distributed.straggler import Straggler, find_straggler


def slowed(arguments: list[str], slow_rank: int) -> tuple[Straggler | None, float]:
    """What is found when one rank's forward passes take longer, and its clock's second reading."""
    config, engine = build_engine(arguments)
    chunk: Any = engine.chunks[0]
    original = chunk.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if engine.runtime.rank == slow_rank:
            time.sleep(0.1)
        return original(*args, **kwargs)

    chunk.forward = forward
    engine.set_learning_rate(0.001)
    engine.forward_backward(batches(config, engine, 1))
    engine.step()
    found = find_straggler(engine.runtime, engine.forward_clock.read())
    again = engine.forward_clock.read()
    engine.close()
    return found, again


def test_the_slow_data_parallel_rank(two_ranks: RankPool, data_cache: str) -> None:
    for found, again in two_ranks.run(slowed, ["--data.cache", data_cache], 1):
        assert found is not None
        assert found.rank == 1
        assert found.ratio > 1.2
        assert again == 0.0


def test_ranks_with_different_work_are_not_compared(two_ranks: RankPool, data_cache: str) -> None:
    arguments = ["--data.cache", data_cache, "--parallel.pipeline", "2"]
    assert [found for found, _ in two_ranks.run(slowed, arguments, 1)] == [None, None]
