"""Layers that are computed again in the backward pass see the positions of their own microbatch, with several in flight."""

from __future__ import annotations

import pytest
from support.ranks import RankPool
from support.train import SMOKE, batches, build_engine

from megagamma.testing.equality import Layout, Trace, compare, trace

STEPS = 6


def arguments(cache: str, *more: str) -> list[str]:
    """Sequences long enough to hold the end of a document, after which positions begin again.

    Attention goes on over the end: within a document alone a shift of all positions would change nothing.
    """
    return [
        *(*SMOKE, "--data.cache", cache, "--data.sequence_length", "256", "--optimizer.lr", "0.0003"),
        *("--data.reset_positions", "true", "--init.gamma", "0.5", *more),
    ]


def positions_begin_again(given: list[str]) -> list[int]:
    """Of the first batch, how many documents begin inside each microbatch."""
    config, engine = build_engine(given[len(SMOKE) :])
    counts = [int((batch.position_ids[:, 1:] == 0).sum()) for batch in batches(config, engine, 1)]
    engine.close()
    return counts


@pytest.fixture(scope="module")
def reference(one_rank: RankPool, data_cache: str) -> Trace:
    """One process that keeps every activation."""
    return one_rank.run(trace, arguments(data_cache, *Layout().flags()), STEPS)[0]


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (Layout(pipeline=2), "full"),
        (Layout(pipeline=2, virtual=2), "full"),
        pytest.param(Layout(pipeline=2), "selective", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recomputation_with_positions_that_begin_again(
    two_ranks: RankPool, data_cache: str, reference: Trace, layout: Layout, recompute: str
) -> None:
    given = arguments(data_cache, *layout.flags(), "--model.recompute", recompute)
    row = compare(two_ranks.run(trace, given, STEPS)[0], reference)
    assert row["weights equal"]
    assert row["loss"] < 1e-5
    assert row["norm"] < 1e-5


def test_positions_do_begin_again_and_matter(one_rank: RankPool, data_cache: str, reference: Trace) -> None:
    """The negative control: documents end inside the batch, in some microbatches and not in others."""
    counts = one_rank.run(positions_begin_again, arguments(data_cache))[0]
    assert len(counts) == 8 and max(counts) >= 1 and len(set(counts)) > 1
    plain = arguments(data_cache, *Layout().flags(), "--data.reset_positions", "false")
    row = compare(one_rank.run(trace, plain, STEPS)[0], reference)
    assert row["weights equal"]
    assert row["norm"] > 1e-4
