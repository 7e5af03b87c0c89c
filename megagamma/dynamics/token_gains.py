"""Where one model gains on another, token by token, with intervals over sequences."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megagamma.dynamics.token_losses import TokenLosses
from megagamma.errors import MegagammaError

# Words that carry grammar more than content; lower case.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a about after all also an and any are as at be because been before but by can could did do does for from had has "
        "have he her his how i if in into is it its may me more most my no not of on one only or other our out over she "
        "should so some such than that the their them then there these they this those to under up was we were what when "
        "where which who will with would you your",
    )
)
_IDENTIFIER = re.compile(r"[A-Za-z]+_\w*|\w*_[A-Za-z]+|[a-z]+[A-Z]\w*")
_SPACE = "\u2581"  # SentencePiece's mark of a word's beginning


@dataclass(frozen=True)
class Row:
    """The gain on one kind of tokens: the baseline's loss less the other's."""

    split: str
    kind: str
    tokens: int
    share: float
    baseline: float
    """Mean loss of the baseline. Unit: nats."""
    gain: float
    low: float
    high: float
    """95 % interval of the mean gain, by bootstrap over sequences."""


def check_comparable(first: TokenLosses, second: TokenLosses) -> None:
    """Refuse losses of other texts or tokens.

    Raises:
        MegagammaError: tokenizers or held-out tokens differ.
    """
    if first.tokenizer != second.tokenizer:
        raise MegagammaError(
            "the two models have different tokenizers: their tokens are not the same, and losses per token do not compare; "
            "compare bits per byte (tools/compare_runs.py)"
        )
    if first.labels.shape != second.labels.shape or not np.array_equal(first.labels, second.labels):
        raise MegagammaError(
            "the two models were measured on different held-out tokens: give runs of the same validation data"
        )


def kind_of_piece(piece: str) -> str:
    """What a token is by its text: digit, identifier of code, function word, start or inside of a word, other."""
    starts, text = piece.startswith(_SPACE), piece.removeprefix(_SPACE)
    if any(letter.isdigit() for letter in text):
        return "digit"
    if _IDENTIFIER.fullmatch(text):
        return "code identifier"
    if starts and text.lower() in _FUNCTION_WORDS:
        return "function word"
    if not any(letter.isalpha() for letter in text):
        return "other"
    return "word start" if starts else "inside of a word"


def copied(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether a label has followed its input before in the sequence: [sequences, s]."""
    found = np.zeros(labels.shape, dtype=bool)
    for row, (inputs, targets) in enumerate(zip(tokens.tolist(), labels.tolist(), strict=True)):
        seen: set[tuple[int, int]] = set()
        for place, pair in enumerate(zip(inputs, targets, strict=True)):
            found[row, place] = pair in seen
            seen.add(pair)
    return found


_Split = tuple[list[str], np.ndarray]
"""Kinds in their order, and the number of each token's kind, [sequences, s]."""


def _binned(values: np.ndarray, edges: Sequence[float], unit: str) -> _Split:
    names = [f"below {edges[0]:g}{unit}", *(f"{a:g} to {b:g}{unit}" for a, b in itertools.pairwise(edges))]
    return [*names, f"{edges[-1]:g}{unit} and more"], np.searchsorted(edges, values, side="right")


KINDS = ["word start", "inside of a word", "function word", "digit", "code identifier", "other"]
"""Of `kind_of_piece`."""


def splits(judge: TokenLosses, pieces: Sequence[str]) -> dict[str, _Split]:
    """Every way to split tokens, by what one model and the text say alone.

    A split by a model's own loss favours others where that loss is high, and itself where it is low, as any choice by a number
    with noise does. So the judge should be none of the two that are compared: the baseline of another seed.
    """
    kinds = np.array([KINDS.index(kind_of_piece(piece)) for piece in pieces])[judge.labels]
    counts = np.bincount(judge.labels.ravel(), minlength=len(pieces))[judge.labels]
    places = np.broadcast_to(np.arange(judge.labels.shape[1]), judge.labels.shape)
    gain = np.nan_to_num(judge.short - judge.full)
    return {
        "baseline loss": _binned(np.nan_to_num(judge.full), (0.1, 1.0, 3.0), " nats"),
        "context gain of the baseline": _binned(gain, (0.0, 0.2, 1.0), " nats"),
        "token": (KINDS, kinds),
        "copied from context": (["new", "seen before"], copied(judge.tokens, judge.labels).astype(int)),
        "position": _binned(places, (4, 32, 128), " tokens"),
        "occurrences in the set": _binned(counts, (2, 10, 100), ""),
    }


def another_seed(seed: int, of: Mapping[int, TokenLosses]) -> TokenLosses | None:
    """Losses of the next seed after one, in a circle; None: there is no other."""
    others = sorted(one for one in of if one != seed)
    return of[next((one for one in others if one > seed), others[0])] if others else None


def gains(
    baseline: TokenLosses,
    other: TokenLosses,
    pieces: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
    judge: TokenLosses | None = None,
) -> list[Row]:
    """The gain on all tokens, and on every kind of every split.

    Intervals are over sequences of this text, of these two models: another seed of training is not in them.

    Args:
        pieces: text of every token.
        draws: of the bootstrap.
        judge: the model whose losses tell kinds of tokens apart, see `splits`; the baseline where it is not given.

    Raises:
        MegagammaError: see `check_comparable`.
    """
    check_comparable(baseline, other)
    if judge is not None:
        check_comparable(baseline, judge)
    valid = np.isfinite(baseline.full) & np.isfinite(other.full)
    delta = np.where(valid, baseline.full - other.full, 0.0).astype(np.float64)
    loss = np.where(valid, baseline.full, 0.0).astype(np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(delta), (draws, len(delta)))
    every = {"all": (["all tokens"], np.zeros(delta.shape, dtype=int)), **splits(judge or baseline, pieces)}
    rows = []
    for split, (names, kinds) in every.items():
        for index, kind in enumerate(names):
            inside = valid & (kinds == index)
            if not inside.any():
                continue
            count, total = inside.sum(1).astype(np.float64), (delta * inside).sum(1)
            means = total[chosen].sum(1) / np.maximum(count[chosen].sum(1), 1)
            low, high = np.quantile(means, (0.025, 0.975))
            number = int(count.sum())
            rows.append(
                Row(
                    split, kind, number, number / int(valid.sum()), float((loss * inside).sum() / number),
                    float(total.sum() / number), float(low), float(high),
                )
            )  # fmt: skip
    return rows
