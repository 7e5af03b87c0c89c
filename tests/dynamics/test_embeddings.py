"""Embeddings whose geometry is known, and signatures counted by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megagamma.data.contracts import Batch
from megagamma.dynamics import embeddings
from megagamma.dynamics.embeddings import Signatures, correlation, geometry, random_geometry, signatures


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Text:
    """A held-out set of rows of tokens."""

    def __init__(self, rows: Tensor, masked: Sequence[tuple[int, int]] = ()) -> None:
        self.rows, self.masked, self.size = rows, masked, len(rows)

    def batch(self, ids: Sequence[int]) -> Batch:
        chosen = self.rows[list(ids)]
        mask = torch.ones(len(self.rows), self.rows.shape[1] - 1)
        for row, column in self.masked:
            mask[row, column] = 0
        return Batch(chosen[:, :-1], chosen[:, 1:], mask[list(ids)], torch.zeros(1))


def counted(rows: Tensor, vocab_size: int, masked: Sequence[tuple[int, int]]) -> Tensor:
    table = torch.zeros(vocab_size, vocab_size)
    for i, row in enumerate(rows.tolist()):
        for j, (token, following) in enumerate(itertools.pairwise(row)):
            if (i, j) not in masked:
                table[token, following] += 1
    return table


def test_signatures_are_what_is_counted() -> None:
    rows, masked = torch.randint(0, 30, (150, 9), generator=torch.Generator().manual_seed(1)), [(3, 2), (149, 7)]
    rows[:, 4] = 7  # the most frequent token
    text: Any = Text(rows, masked)
    found, table = signatures(text, 32), counted(rows, 32, masked)
    counts = table.sum(1)
    assert found.tokens[0] == 7 and len(found.tokens) == 30, "the two that never occur are left out"
    assert (counts[found.tokens].diff() <= 0).all()
    unit = table[found.tokens] / table[found.tokens].norm(dim=1, keepdim=True)
    assert torch.allclose(found.cosine, unit @ unit.t(), atol=1e-6)
    other = signatures(Text(rows), 32)  # type: ignore[arg-type]
    assert not torch.allclose(other.cosine, found.cosine, atol=1e-6), "the control: masked pairs count here"


def test_no_more_tokens_than_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(90).reshape(30, 3)
    monkeypatch.setattr(embeddings, "MOST_TOKENS", 11)
    text: Any = Text(rows)
    assert len(signatures(text, 90).tokens) == 11


def test_embeddings_that_follow_the_signatures() -> None:
    table = random(50, 24, seed=2).abs().square()
    frequent = Signatures(torch.arange(50).flip(0), embeddings.cosines(table.flip(0)))
    found = geometry(3.0 * table, frequent)
    assert found["signature_correlation"] == pytest.approx(1.0, abs=1e-5)
    mixed = geometry(table + random(50, 24, seed=3), frequent)["signature_correlation"]
    assert 0.1 < mixed < 0.9
    # The controls: rows in another order, and random rows, correlate with nothing (standard error about 0.03).
    assert abs(geometry(table.roll(1, 0), frequent)["signature_correlation"]) < 0.15
    assert abs(random_geometry(frequent, 24)["signature_correlation"]) < 0.15


def test_known_geometry() -> None:
    frequent = Signatures(torch.arange(20), torch.eye(20))
    line = torch.outer(torch.linspace(1, 2, 20), random(12))
    found = geometry(line, frequent)
    assert found["frequent_cosine"] == pytest.approx(1) and found["first_axis_share"] == pytest.approx(1)
    opposite = geometry(line * torch.tensor([1.0, -1.0] * 10)[:, None], frequent)
    assert opposite["frequent_cosine"] == pytest.approx(-20 / 380, abs=1e-5)
    assert opposite["frequent_condensation"] == pytest.approx(1, abs=1e-5)
    orthogonal = geometry(torch.eye(20), frequent)
    assert orthogonal["frequent_cosine"] == pytest.approx(0, abs=1e-6)
    assert orthogonal["axis_shares"] == pytest.approx([1 / 19] * 8), (
        "a simplex has as many equal axes as it has dimensions"
    )


def test_correlation_is_pearsons() -> None:
    first, second = (one + one.t() for one in (random(9, 9, seed=4), random(9, 9, seed=5)))
    above = torch.triu_indices(9, 9, 1)
    expected = torch.corrcoef(torch.stack([first[above[0], above[1]], second[above[0], above[1]]]))[0, 1]
    assert correlation(first, second) == pytest.approx(float(expected), abs=1e-6)
    assert correlation(first, torch.ones(9, 9)) != correlation(first, torch.ones(9, 9)), "of a constant there is none"
