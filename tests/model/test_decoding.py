"""Greedy decoding, with a counter in a model's place: the next token is the last one plus one."""

from __future__ import annotations

import pytest

from megagamma.model.decoding import greedy_continuations


class Counter:
    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def __call__(self, rows: list[list[int]]) -> list[int]:
        self.calls.append([list(row) for row in rows])
        return [row[-1] + 1 for row in rows]


def test_limits_are_each_prompts_own() -> None:
    model, prompts = Counter(), [[5], [1, 2], [7]]
    assert greedy_continuations(model, prompts, [1, 3, 0]) == [[6], [3, 4, 5], []]
    assert prompts == [[5], [1, 2], [7]], "prompts stay as they are"
    # Rows that are complete are not run again, and every row grows by what it made.
    assert model.calls == [[[5], [1, 2]], [[1, 2, 3]], [[1, 2, 3, 4]]]


def test_eos_ends_a_row_and_is_left_out() -> None:
    assert greedy_continuations(Counter(), [[1], [7]], [9, 2], eos=4) == [[2, 3], [8, 9]]
    assert greedy_continuations(Counter(), [[3]], [9], eos=4) == [[]]
    assert greedy_continuations(Counter(), [[3]], [2], eos=None) == [[4, 5]]


def test_stop_keeps_the_token_that_it_saw() -> None:
    seen: list[tuple[int, list[int]]] = []

    def stop(index: int, tokens: list[int]) -> bool:
        seen.append((index, list(tokens)))
        return index == 1 and tokens[-1] == 12

    assert greedy_continuations(Counter(), [[1], [10]], [3, 9], stop=stop) == [[2, 3, 4], [11, 12]]
    assert seen[:2] == [(0, [2]), (1, [11])] and (1, [11, 12]) in seen


def test_nothing_to_do_runs_nothing() -> None:
    model = Counter()
    assert greedy_continuations(model, [], []) == [] and greedy_continuations(model, [[1]], [0]) == [[]]
    assert model.calls == []


def test_a_model_that_loses_a_row_is_noticed() -> None:
    with pytest.raises(ValueError, match="shorter"):
        greedy_continuations(lambda rows: [1], [[1], [2]], [1, 1])
