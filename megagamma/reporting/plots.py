"""Pictures of curves, drawn without a display and without pyplot's global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megagamma.files import atomic_file


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure and its axes [rows, columns].

    Args:
        width, height: of one of the axes. Unit: inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows))
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish_axis(axis: Any, x: str, y: str, legend_size: float | None = None) -> None:
    """Labels, a faint grid, and a legend where something has a name."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=legend_size)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG, atomically.

    Raises:
        MegagammaError: it cannot be written; what was there stays.
    """
    figure.tight_layout()
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
