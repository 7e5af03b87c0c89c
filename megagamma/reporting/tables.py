"""Tables as text: Markdown, CSV, and columns aligned for the console; and how a number is written in one."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, without a line break at its end.

    Args:
        columns: titles.
        rows: a cell for each column, written as str() writes it.
    """
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells for {len(columns)} columns: {row}")
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def csv_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with a line of titles; what is None or missing is an empty cell, further keys are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow("" if row.get(column) is None else row[column] for column in columns)
    return text.getvalue()


def aligned_table(columns: Sequence[str], widths: Sequence[int], rows: Iterable[Sequence[str]]) -> str:
    """Columns of a fixed width for the console, the first one to the left and the others to the right.

    Args:
        columns: titles.
        widths: of each column in characters, the space before it included; a longer cell moves the rest of its line.
        rows: cells as text.
    """

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)

    return "\n".join(line(cells) for cells in [columns, *rows])


def fitted_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`aligned_table` with columns as wide as their longest cell, and two spaces between them."""
    widths = [max(len(cells[i]) for cells in [columns, *rows]) + (2 if i else 0) for i in range(len(columns))]
    return aligned_table(columns, widths, rows)


def format_cell(value: Any) -> str:
    """A measured value: 4 decimals below 100, else thousands; whole numbers with thousands; other values as text."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_score(value: float | None, error: float | None = None, digits: int = 4) -> str:
    """`0.2534 +- 0.0121`, or a dash for None.

    Args:
        error: its standard error; None: not shown.
    """
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" +- {error:.{digits}f}" if error is not None else "")
