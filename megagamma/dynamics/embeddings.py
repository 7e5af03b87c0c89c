"""Geometry of the most frequent tokens' embeddings, and what of it follows from which tokens come next.

Source of the correlation, with the tags of docs/claims.md: [PRE: arXiv 2608.30315]. With phi_a = P(next | a), the signature of
token a, it is Pearson's between the cosines of the embeddings and those of the signatures, over all pairs of tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagamma.data.contracts import EvaluationSet
from megagamma.dynamics.matrices import cosines, mean_absolute_cosine
from megagamma.initialization.streams import normal_

FREQUENT = 200
"""Tokens whose embeddings are looked at [PRE: 2608.30315]."""
AXES = 8
"""Principal axes whose share of the variance is kept."""
MOST_TOKENS = 1 << 20
"""Tokens of held-out text that are counted at most."""
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Signatures:
    """The most frequent tokens of a text and what follows them."""

    tokens: Tensor
    """Ids by descending frequency, int64 [k]."""
    cosine: Tensor
    """Cosine of every pair of next-token distributions, [k, k]."""


def signatures(evaluation_set: EvaluationSet, vocab_size: int) -> Signatures:
    """Of the first tokens of a set, at most `MOST_TOKENS`; pairs that the loss leaves out are not counted."""
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    first, left = 0, MOST_TOKENS
    while first < evaluation_set.size and left > 0:
        batch = evaluation_set.batch(range(first, min(first + 64, evaluation_set.size)))
        kept = batch.loss_mask > 0
        inputs.append(batch.tokens[kept][:left])
        labels.append(batch.labels[kept][:left])
        first, left = first + 64, left - len(inputs[-1])
    token, following = torch.cat(inputs), torch.cat(labels)
    counts = torch.bincount(token, minlength=vocab_size)
    order = torch.argsort(counts, descending=True, stable=True)[:FREQUENT]
    frequent = order[counts[order] > 0]
    place = torch.full((vocab_size,), -1)
    place[frequent] = torch.arange(len(frequent))
    row = place[token]
    table = torch.zeros(len(frequent), vocab_size)
    table.index_put_((row[row >= 0], following[row >= 0]), torch.ones(int((row >= 0).sum())), accumulate=True)
    return Signatures(frequent, cosines(table / table.sum(1, keepdim=True)))


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of the upper triangles of two symmetric matrices; not a number where one is constant."""
    above = torch.ones_like(first, dtype=torch.bool).triu(1)
    x, y = first[above].double(), second[above].double()
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else math.nan


def geometry(matrix: Tensor, frequent: Signatures) -> dict[str, Any]:
    """Numbers of an embedding or head, (vocabulary, hidden), by the rows of the frequent tokens; names as in dynamics.jsonl."""
    rows = matrix[frequent.tokens.to(matrix.device)].float().cpu()
    cosine = cosines(rows)
    count = len(rows)
    centred = (rows - rows.mean(0)).double()
    variances = torch.linalg.svdvals(centred).square()
    shares = (variances / variances.sum().clamp_min(torch.finfo(torch.float64).tiny))[:AXES]
    return {
        "frequent_cosine": float(
            (cosine.sum(dtype=torch.float64) - cosine.diagonal().sum()) / max(count * (count - 1), 1)
        ),
        "frequent_condensation": mean_absolute_cosine(cosine),
        "signature_correlation": correlation(cosine, frequent.cosine),
        "first_axis_share": float(shares[0]),
        "axis_shares": [float(share) for share in shares],
    }


@functools.lru_cache(maxsize=16)
def _random_rows(count: int, width: int) -> Tensor:
    shape = (count, width)
    return normal_(torch.empty(shape), seed=0, name="random rows", global_shape=shape, std=1.0)


def random_geometry(frequent: Signatures, width: int) -> Mapping[str, Any]:
    """`geometry` of random rows."""
    count = len(frequent.tokens)
    return geometry(_random_rows(count, width), Signatures(torch.arange(count), frequent.cosine))
