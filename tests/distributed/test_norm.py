"""The gradient norm, and so the clipping, does not depend on the layout, at the size of a real vocabulary too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import RankPool
from support.train import SMOKE

from megagamma.distributed.norm import sum_of_squares
from megagamma.testing.equality import Layout, compare, trace

# 50,000 tokens: 3.2 million weights in the embedding, and as many in the head.
LARGE = [
    *SMOKE, "--model.vocab_size", "50000", "--model.num_layers", "2", "--data.global_batch_size", "4",
    "--data.sequence_length", "32", "--optimizer.lr", "0.0003",
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 255, 256, 1000, 1 << 22])
@pytest.mark.parametrize("kind", ["normal", "equal"])
def test_sum_of_squares(size: int, kind: str) -> None:
    values = (
        torch.full((size,), 0.1) if kind == "equal" else torch.randn(size, generator=torch.Generator().manual_seed(1))
    )
    exact = float(values.double().square().sum())
    halves = [values[: size // 2], values[size // 2 :]]
    assert float(sum_of_squares([values], values.device)) == pytest.approx(exact, rel=2e-7)
    assert float(sum_of_squares(halves, values.device)) == pytest.approx(exact, rel=2e-7)


def test_one_float32_sum_would_fail() -> None:
    """The negative control: squares added up one after the other in float32."""
    values = np.full(1 << 22, 0.1, dtype=np.float32)
    naive = np.add.accumulate(values * values, dtype=np.float32)[-1]
    assert abs(naive / float((values.astype(np.float64) ** 2).sum()) - 1) > 1e-3


def test_not_a_number_and_infinity_are_kept() -> None:
    for bad in (float("nan"), float("inf")):
        values = torch.ones(1000)
        values[7] = bad
        assert not bool(sum_of_squares([values], values.device).isfinite())


@pytest.fixture(scope="module")
def reference(one_rank: RankPool, data_cache: str) -> Any:
    return one_rank.run(trace, [*LARGE, "--data.cache", data_cache, *Layout().flags()], 20)[0]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2),
        Layout(tensor=2, zero=1, sequence=True),
        Layout(pipeline=2),
        *(Layout(data=2, zero=zero) for zero in (0, 1, 2, 3)),
    ],
    ids=str,
)
def test_layouts_agree_at_a_real_vocabulary(
    two_ranks: RankPool, data_cache: str, reference: Any, layout: Layout
) -> None:
    found = two_ranks.run(trace, [*LARGE, "--data.cache", data_cache, *layout.flags()], 20)[0]
    row = compare(found, reference)
    assert row["weights equal"]
    assert found.norms[0] == pytest.approx(reference.norms[0], rel=1e-6)
    assert row["loss"] < 1e-5
    assert row["norm"] < 1e-5
