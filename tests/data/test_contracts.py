"""A global batch is dealt out to ranks and microbatches, each sample once, in an order that a layout does not change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from megagamma.data.contracts import Batch, microbatch_ids, rank_microbatches


class Numbers:
    """A source whose sample i holds the number i."""

    def batch(self, ids: Sequence[int]) -> Batch:
        rows = torch.tensor(ids).unsqueeze(1).repeat(1, 3)
        return Batch(rows, rows, torch.ones(rows.shape), torch.arange(3).repeat(len(ids), 1))


def dealt(first: int, size: int, micro: int, ranks: int) -> list[list[list[int]]]:
    """Sample numbers by rank and microbatch."""
    return [
        [batch.tokens[:, 0].tolist() for batch in rank_microbatches(Numbers(), first, size, micro, rank, ranks)]
        for rank in range(ranks)
    ]


def test_order_by_hand() -> None:
    # Microbatch by microbatch, and within one rank by rank.
    assert dealt(16, 8, 2, 2) == [[[16, 17], [20, 21]], [[18, 19], [22, 23]]]
    assert microbatch_ids(100, 1, 2, 2, 3) == [110, 111]


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (12, 1), (1, 4), (3, 2), (2, 6), (4, 3), (1, 12)])
def test_every_layout_has_the_samples_of_the_batch_once(micro: int, ranks: int) -> None:
    shares = dealt(24, 12, micro, ranks)
    assert sorted(number for share in shares for batch in share for number in batch) == list(range(24, 36))
    assert {len(share) for share in shares} == {12 // (micro * ranks)}
    assert {len(batch) for share in shares for batch in share} == {micro}
    # Read microbatch by microbatch over the ranks, the samples are in their order.
    order = [number for batches in zip(*shares, strict=True) for batch in batches for number in batch]
    assert order == list(range(24, 36))


@pytest.mark.parametrize(("size", "micro", "ranks"), [(8, 3, 1), (8, 1, 3), (8, 16, 1), (0, 1, 1)])
def test_a_batch_that_cannot_be_dealt_out_is_refused(size: int, micro: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{size} samples are no multiple of {micro} x {ranks} ranks"):
        rank_microbatches(Numbers(), 0, size, micro, 0, ranks)


def test_batch_on_a_device_keeps_what_is_missing() -> None:
    batch = Numbers().batch([4, 5])
    batch.label_bytes = torch.ones(2, 3, dtype=torch.int64)
    moved = batch.to(torch.device("meta"))
    assert moved is not batch and batch.tokens.device.type == "cpu"
    assert moved.document_ids is None
    for name in ("tokens", "labels", "loss_mask", "position_ids", "label_bytes"):
        tensor, original = getattr(moved, name), getattr(batch, name)
        assert (tensor.device.type, tensor.shape, tensor.dtype) == ("meta", original.shape, original.dtype)
