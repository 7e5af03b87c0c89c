"""Tables as text: what they hold, character by character."""

from __future__ import annotations

import csv
import io
import math

import pytest

from megagamma.reporting.tables import aligned_table, csv_table, format_cell, format_score, markdown_table


def test_markdown() -> None:
    assert markdown_table(("a", "b"), [(1, "x"), (None, 2.5)]) == "| a | b |\n|---|---|\n| 1 | x |\n| None | 2.5 |"
    assert markdown_table(["only"], []) == "| only |\n|---|"
    with pytest.raises(ValueError, match="a row of 1 cells for 2 columns"):
        markdown_table(("a", "b"), [(1,)])


def test_csv_is_read_back() -> None:
    rows = [{"a": 'say "x", y', "b": None, "more": 1}, {"b": 0.25}]
    text = csv_table(["a", "b"], rows)
    assert text.splitlines()[0] == "a,b" and text.endswith("\n") and "\r" not in text
    assert list(csv.DictReader(io.StringIO(text))) == [{"a": 'say "x", y', "b": ""}, {"a": "", "b": "0.25"}]


def test_aligned() -> None:
    assert aligned_table(("name", "std"), (8, 6), [("q", "0.1"), ("a_long_name", "0.02")]).splitlines() == [
        "name       std",
        "q          0.1",
        "a_long_name  0.02",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.2346"), (-99.99999, "-100.0000"), (100.0, "100"), (54321.9, "54,322"), (12345, "12,345"),
        ("run", "run"), (None, "None"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_cells(value: object, text: str) -> None:
    assert format_cell(value) == text


def test_scores() -> None:
    assert format_score(None) == "-" and format_score(None, 0.1) == "-"
    assert format_score(0.25) == "0.2500"
    assert format_score(0.25341, 0.01209) == "0.2534 +- 0.0121"
    assert format_score(2, 1, digits=1) == "2.0 +- 1.0"
