"""Scaling fits: planted laws recovered, intervals that cover as stated, a published fit, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megagamma.commands.fit_scaling import main, verdicts
from megagamma.errors import ConfigurationError
from megagamma.scaling.fit import (
    Law,
    Observation,
    Term,
    bootstrap,
    fit,
    isoflops,
    quantiles,
    resampled,
    speed_up,
    without_largest,
)

SIZES, TOKENS = (1e6, 4e6, 1.6e7, 6.4e7, 2.6e8), (2e7, 1e8, 5e8, 2.5e9)
TRUE = Law(
    1.8,
    {"half": Term(300.0, 0.33, 1.0), "one": Term(520.0, 0.38, 1.0)},
    {"half": Term(420.0, 0.29, 1.0), "one": Term(420.0, 0.29, 1.0)},
    0.0,
    (),
)


def planted(noise: float, seed: int = 0, seeds: Sequence[int] = (1, 2), law: Law = TRUE) -> list[Observation]:
    """Losses of a law with normal noise on their logarithm, of runs and of points, the latter shared by the arms."""
    generator, found = np.random.default_rng(seed), []
    for size in SIZES:
        for tokens in TOKENS:
            shared = generator.standard_normal() * noise / 2
            for arm in law.size:
                for number in seeds:
                    loss = law.at(arm, size, tokens) * math.exp(shared + noise * generator.standard_normal())
                    found.append(
                        Observation(arm, size, tokens, loss, number, "text", f"{arm}-{size:g}-{tokens:g}-{number}")
                    )
    return found


def test_a_law_without_noise_is_found_exactly() -> None:
    law = fit(planted(0.0))
    assert law.irreducible == pytest.approx(1.8, rel=1e-6) and law.notes == ()
    for arm in TRUE.size:
        for found, true in ((law.size[arm], TRUE.size[arm]), (law.tokens[arm], TRUE.tokens[arm])):
            assert found.exponent == pytest.approx(true.exponent, rel=1e-5)
            assert found.at(1.0) == pytest.approx(true.coefficient, rel=1e-4)
    # At the largest point, by the definition: the same loss from fewer tokens.
    ratio = speed_up(law, "half", "one", SIZES[-1], TOKENS[-1])
    assert ratio > 1
    assert TRUE.at("one", SIZES[-1], TOKENS[-1] / ratio) == pytest.approx(
        TRUE.at("half", SIZES[-1], TOKENS[-1]), rel=1e-6
    )
    assert speed_up(law, "one", "half", SIZES[-1], TOKENS[-1]) < 1, "the control: the other way round it is slower"
    error, points = without_largest(planted(0.0), "both", 1e-3) or (1.0, 0)
    assert error < 1e-6 and points == 2 * 2 * len(TOKENS)


@pytest.mark.parametrize("form", ["size", "tokens"])
def test_one_term_alone(form: str) -> None:
    kept = [one for one in planted(0.0) if (one.tokens == TOKENS[1] if form == "size" else one.size == SIZES[2])]
    law = fit(kept, form)  # type: ignore[arg-type]
    terms, true = (law.size, TRUE.size) if form == "size" else (law.tokens, TRUE.tokens)
    assert not (law.tokens if form == "size" else law.size)
    if form == "size":  # the other term is one constant, the same in both arms, and goes into E
        assert law.irreducible == pytest.approx(1.8 + TRUE.tokens["half"].at(TOKENS[1]), rel=1e-4)
        assert terms["one"].exponent == pytest.approx(true["one"].exponent, rel=1e-3)
    else:
        alone = fit([one for one in kept if one.arm == "one"], "tokens")
        assert alone.tokens["one"].exponent == pytest.approx(0.29, rel=1e-3)


def test_an_outlier_hardly_moves_it() -> None:
    clean = planted(0.001)
    spoiled = [replace(one, loss=one.loss * 1.3) if index == 7 else one for index, one in enumerate(clean)]

    def moved(delta: float) -> float:
        return abs(fit(spoiled, delta=delta).size["half"].exponent - fit(clean, delta=delta).size["half"].exponent)

    # The control: least squares, which a wide delta is, is moved by it.
    assert moved(1e-3) < 0.002 and moved(10.0) > 5 * moved(1e-3)


def coverage(trials: int, draws: int) -> float:
    hits = 0
    for trial in range(trials):
        observations = planted(0.004, seed=100 + trial)
        law = fit(observations)
        laws = bootstrap(observations, law, "both", draws=draws, seed=trial)
        low, high = quantiles([one.size["one"].exponent - one.size["half"].exponent for one in laws])
        hits += low <= 0.05 <= high
    return hits / trials


def test_intervals_cover_the_difference_of_exponents() -> None:
    """Of 12 planted studies at least 9: with a coverage of 0.95 fewer come once in 2,000 times. The long test counts more."""
    assert coverage(12, 60) >= 9 / 12


@pytest.mark.slow
def test_intervals_cover_at_length() -> None:
    """Stated: 0.95. A percentile bootstrap of 20 points is a little narrow; 200 studies must show between 0.86 and 1."""
    assert 0.86 <= coverage(200, 200) <= 1.0


def test_published_fit() -> None:
    """206 of the runs behind figure 4 of arXiv 2203.15556, as arXiv 2404.10102 read them off (4 digits). Its fit of 240 runs: E
    1.8172, A 482.01, a 0.3478, B 2085.43, b 0.3658, with standard errors 0.03, 124.58, 0.02, 1293.23, 0.02. D is C / 6N."""
    with (Path(__file__).parent / "chinchilla.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    observations = [
        Observation(
            "all", row["parameters"], row["flops"] / (6 * row["parameters"]), row["loss"], 0, "MassiveText", str(index)
        )
        for index, row in enumerate(rows)
    ]
    law = fit(observations)
    assert law.irreducible == pytest.approx(1.8172, abs=0.03)
    assert law.size["all"].exponent == pytest.approx(0.3478, abs=0.02)
    assert law.tokens["all"].exponent == pytest.approx(0.3658, abs=0.02)
    assert law.size["all"].at(1.0) == pytest.approx(482.01, abs=124.58)
    assert law.tokens["all"].at(1.0) == pytest.approx(2085.43, abs=1293.23)
    # The control: what the first paper printed, E 1.69, a 0.34, b 0.28, is not what its runs give.
    assert abs(law.irreducible - 1.69) > 0.05 and abs(law.tokens["all"].exponent - 0.28) > 0.05


def test_draws_keep_points_and_seeds_together() -> None:
    observations = planted(0.01)
    for _ in range(20):
        drawn = resampled(observations, "both", np.random.default_rng(3))
        arms = [sorted((one.size, one.tokens, one.seed) for one in drawn if one.arm == arm) for arm in ("half", "one")]
        assert arms[0] == arms[1] and len({one.size for one in drawn}) >= 4


def test_isoflop_optima() -> None:
    budget = 1e16
    own = [
        Observation("a", size, budget / size, 2 + (math.log(size / 3e7)) ** 2, 1, "x", f"{size}")
        for size in (3e6, 1e7, 3e7, 9e7, 3e8)
    ]
    (one,) = isoflops(own)
    assert float(one["best"]) == pytest.approx(3e7, rel=1e-2) and one["flops"] == pytest.approx(6e16)
    (edge,) = isoflops(own[2:])
    assert edge["best"] == "at an edge: widen the sizes"


def test_what_is_refused() -> None:
    whole = planted(0.0)
    for observations, message in (
        ([], "there are no finished points"),
        ([replace(whole[0], loss=math.nan), *whole[1:]], r"half-1e\+06-2e\+07-1: loss nan"),
        ([replace(whole[0], data="other"), *whole[1:]], "losses on different data make no law"),
        (
            [one for one in whole if one.size < 5e7],
            "arm half: has 3 different sizes, and an exponent needs 4.*--form tokens",
        ),
        ([one for one in whole if one.tokens > 5e7], "has 3 different token counts"),
        ([replace(one, tokens=20 * one.size) for one in whole], "sizes and tokens move together"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            fit(observations)
    rising = [replace(one, loss=1 / one.loss) for one in whole]
    with pytest.raises(ConfigurationError, match=r"losses do not fall with|no law of this form comes near"):
        fit(rising)
    flat = [replace(one, loss=1.8 + TRUE.tokens["half"].at(one.tokens)) for one in whole]
    with pytest.raises(ConfigurationError, match="losses do not fall with size"):
        fit(flat)
    # A loss that falls by as much with every doubling shows no floor, and that is said; a law that does has no such note.
    straight = [replace(one, loss=9 - 0.2 * math.log(one.size)) for one in whole if one.tokens == TOKENS[0]]
    assert any("irreducible loss is 0 at its bound" in note for note in fit(straight, "size").notes)
    steep = [replace(one, loss=2 + (one.size / 1e6) ** -2.5) for one in straight]
    assert any(
        "the exponent of size is at its bound, 2.00: it is not determined" in note for note in fit(steep, "size").notes
    )


def write_table(path: Path, observations: Sequence[Observation], **changes: str) -> Path:
    columns = ("point", "status", "gamma", "seed", "set", "tokens", "loss", "is_last", "is_best", "lr_tuned", "parameters",
               "non_embedding")  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for one in observations:
            row = {
                "point": one.name, "status": "done", "gamma": one.arm, "seed": one.seed, "set": one.data, "tokens": one.tokens,
                "loss": one.loss, "is_last": True, "is_best": True, "lr_tuned": True, "parameters": 1.5 * one.size,
                "non_embedding": one.size,
            }  # fmt: skip
            writer.writerow({**row, **changes})
            writer.writerow({**row, "is_last": False, "loss": 99})
    return path


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "table.csv", planted(0.002))
    assert main([str(table), "--arm", "gamma", "--draws", "40"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["points"] == 80 and set(found["arms"]) == {"gamma half", "gamma one"}
    difference = found["against_baseline"]["gamma one"]["a_difference"]
    assert difference["low"] < 0.05 < difference["high"] and difference["low"] > 0
    assert "gamma one needs fewer FLOPs for the loss of gamma half" in out and "the other parameter convention" in out
    assert (tmp_path / "fit.png").stat().st_size > 10_000
    choices = {row["choice"]: row for row in found["sensitivity"]}
    assert choices["the other parameter convention"]["a gamma one"] == pytest.approx(
        choices["as asked"]["a gamma one"], abs=1e-3
    )
    assert "not fitted" not in choices["without the smallest size"]
    # Too few sizes without the smallest: said, and the rest is there.
    four = write_table(tmp_path / "four.csv", [one for one in planted(0.002) if one.size > 2e6], lr_tuned="False")
    assert main([str(four), "--arm", "gamma", "--draws", "20", "--output", str(tmp_path / "four")]) == 0
    out = capsys.readouterr().out
    assert (
        "without the smallest size: arm gamma half: has 3 different sizes" in out
        and "learning rates are untuned" in out
    )


def test_the_command_refuses(tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.csv", planted(0.0))
    empty = tmp_path / "empty.csv"
    empty.write_text("point,status\n")
    for words, message in (
        ([str(table), "--arm", "init.gamma"], "has no column init.gamma"),
        ([str(table), "--arm", "gamma", "--baseline", "x"], "'x': is not an arm: use one of gamma half, gamma one"),
        ([str(table), "--delta", "0"], "delta must be above 0"),
        ([str(empty)], "has no rows"),
        ([str(tmp_path / "none.csv")], "cannot be read"),
        ([str(write_table(tmp_path / "open.csv", planted(0.0), status="running"))], "holds no finished point"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            main(words)


def test_verdicts_come_from_intervals() -> None:
    def said(low: float, high: float) -> str:
        about = {"speed_up": {"value": 1.5, "low": low, "high": high}}
        return verdicts({"against_baseline": {"b": about}}, "a")[0]

    assert "needs fewer FLOPs" in said(1.1, 2) and "needs more FLOPs" in said(0.1, 0.9)
    assert "cannot be told apart" in said(0.9, 2)
