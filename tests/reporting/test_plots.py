"""Pictures: written whole, and without a trace in matplotlib's global state."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagamma.errors import MegagammaError
from megagamma.reporting.plots import finish_axis, new_figure, save_figure


def test_a_picture_of_four_axes(tmp_path: Path) -> None:
    import matplotlib
    from PIL import Image

    before = dict(matplotlib.rcParams)
    figure, axes = new_figure(2, 2, 3, 2)
    assert axes.shape == (2, 2)
    axes[0, 1].plot([1, 2], [3, 4], label="a line")
    finish_axis(axes[0, 1], "step", "loss", legend_size=7)
    assert (axes[0, 1].get_xlabel(), axes[0, 1].get_ylabel()) == ("step", "loss")
    assert [text.get_text() for text in axes[0, 1].get_legend().get_texts()] == ["a line"]
    save_figure(figure, tmp_path / "deep" / "plot.png")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["plot.png"]
    with Image.open(tmp_path / "deep" / "plot.png") as image:
        assert image.format == "PNG" and image.size == (6 * 120, 4 * 120)
    assert dict(matplotlib.rcParams) == before


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, _ = new_figure(1, 1, 2, 2)
    (tmp_path / "plot.png").write_bytes(b"old")

    def full(file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(MegagammaError, match=r"plot\.png: cannot be written \(No space"):
        save_figure(figure, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
