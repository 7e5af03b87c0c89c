"""The coordinate check: exponents that theory gives, found by the command; and its arithmetic."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megagamma.commands.coordinate_check import main
from megagamma.errors import ConfigurationError
from megagamma.scaling.coordinates import Coordinate, dependences, scheme_options, slope, study


@pytest.mark.ranks
@pytest.mark.xdist_group("forked")
def test_exponents_are_those_of_theory(tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.yaml"
    text = Path("configs/smoke.yaml").read_text()
    base.write_text(text.replace("corpus: tiny", f"corpus: tiny\n  cache: {data_cache}"))
    words = ["--config", str(base), "--schemes", "gamma=1", "mup", "fixed", "--widths", "32", "128", "--seeds", "1"]
    words += ["--steps", "1", "--output", str(tmp_path / "check")]
    assert main(words) == 0
    rows = list(csv.DictReader((tmp_path / "check" / "dependences.csv").open()))
    found = {(row["scheme"], row["number"], int(row["step"])): float(row["exponent"]) for row in rows}
    # At the start the residual stream is the embedding at gamma 1 and under muP: d^-1 and constant. Normed rows times a head of
    # std s give logits of s sqrt(d): d^-1 d^0.5, d^-1 d^0.5 and d^0.5.
    for scheme, residual, logits in (("gamma1", -1.0, -0.5), ("mup", 0.0, -0.5), ("fixed", None, 0.5)):
        if residual is not None:
            assert found[scheme, "residual_first", 0] == pytest.approx(residual, abs=0.1)
        assert found[scheme, "logits", 0] == pytest.approx(logits, abs=0.1)
    # Adam's first step moves by the learning rate: muP's by 1/d, but for the embedding.
    for number in ("hidden_update", "head_update", "embedding_update"):
        assert found["gamma1", number, 1] == pytest.approx(0, abs=0.05)
        expected = 0.0 if number == "embedding_update" else -1.0
        assert found["mup", number, 1] == pytest.approx(expected, abs=0.05)
    assert "residual stream after the last layer" in capsys.readouterr().out
    assert (tmp_path / "check" / "coordinates.png").stat().st_size > 10_000
    with pytest.raises(ConfigurationError, match="holds another check"):
        main([*words, "--lr", "0.1"])


def test_slope_and_spread() -> None:
    assert slope({64: 3.0 * 64**-0.7, 128: 3.0 * 128**-0.7, 512: 3.0 * 512**-0.7}) == pytest.approx(-0.7)
    found = [
        Coordinate("a", width, seed, 2, "logits", value * width)
        for width in (10, 40)
        for seed, value in ((1, 0.5), (2, 1.5))
    ]
    (one,) = dependences([*found, Coordinate("a", 10, 1, 3, "logits", 1.0)])
    assert (one.scheme, one.number, one.step) == ("a", "logits", 2), "of one width nothing is said"
    assert one.exponent == pytest.approx(1) and one.spread == pytest.approx(4)


def test_schemes_as_they_are_given() -> None:
    assert scheme_options("mup") == {"init.scheme": "mup"}
    assert scheme_options("gamma=1,head=0.5") == {"init.gamma": 1.0, "init.head": 0.5}
    assert scheme_options("fixed,std=0.1,optimizer.lr=0.01") == {
        "init.scheme": "fixed", "init.std": 0.1, "optimizer.lr": 0.01,
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match="give a scheme's name"):
        scheme_options("")


def test_what_is_refused(tmp_path: Path) -> None:
    for words, message in (
        (["--widths", "64"], "at least two different ones"),
        (["--widths", "64", "70"], "--widths 70: must be a multiple of 16"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            main([*words, "--output", str(tmp_path / "x")])
    with pytest.raises(ConfigurationError, match="xavier"):
        main(["--schemes", "xavier", "--output", str(tmp_path / "y")])
    assert study("c", ["mup"], [64, 32], [1], 3, 0.1)["axes"]["width"]["d32"]["model.num_attention_heads"] == 2
