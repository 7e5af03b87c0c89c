"""The critical gamma: every reading from trials whose answer is known, and the search itself, small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megagamma.commands.find_critical_gamma import main
from megagamma.errors import ConfigurationError
from megagamma.scaling.critical import (
    Trial,
    best_rates,
    beyond,
    critical,
    crossing,
    drift,
    finer,
    lowest,
    readings,
    tokens_to,
)

GAMMAS = (0.4, 0.5, 0.7, 0.9, 1.1)


def trials(best: float = 0.8, seeds: tuple[int, ...] = (1, 2), width: int = 64) -> list[Trial]:
    """Losses are a parabola with its lowest at `best`, shifted by the seed; a larger gamma is slower and moves further."""
    found = []
    for gamma in GAMMAS:
        for rate in (0.1, 0.2, 0.4):
            for seed in seeds:
                loss = 3 + (gamma - best - 0.01 * seed) ** 2 + (0 if rate == 0.2 else 0.1)
                # From 6 nats to the end in a straight line, later for larger gammas.
                start = 500 * gamma
                curve = ((start, 6.0), ((start + 1000) / 2, (6 + loss) / 2), (1000.0, loss))
                found.append(
                    Trial(
                        gamma,
                        rate,
                        seed,
                        width,
                        loss,
                        curve,
                        distance=2 * gamma,
                        spikes=int(gamma > 1),
                        context_loss=loss - 1,
                    )
                )
    return found


def named(rows: list) -> dict:  # type: ignore[type-arg]
    return {row.reading: row for row in rows}


def test_readings_of_planted_trials() -> None:
    rates, warnings = best_rates(trials())
    assert set(rates.values()) == {0.2} and warnings == []
    found = readings(trials(), 64, 0.5)
    assert [one.gamma for one in found] == list(GAMMAS)
    assert found[1].times == {1: 1.0, 2: 1.0}, "the baseline against itself"
    assert found[0].times[1] < 1 < found[4].times[1]
    rows = named(critical(found, slower=10.0))
    assert rows["loss"].gamma == pytest.approx(0.815, abs=0.01) and rows["context"].gamma == pytest.approx(
        0.815, abs=0.01
    )
    assert rows["loss"].low < 0.815 < rows["loss"].high, "Student's t over two seeds"
    assert rows["balance"].gamma == rows["loss"].gamma and "every gamma" in rows["balance"].note
    assert rows["boundary"].gamma == pytest.approx(0.5)
    assert rows["stability"].gamma == 0.9 and "no run spiked" in rows["stability"].note
    # Few tokens allowed: the lowest loss among the quick ones.
    quick = named(critical(found, slower=statistics_of(found, 0.7)))
    assert quick["balance"].gamma == 0.7 and rows["loss"].gamma > 0.7
    assert finer(found) == [0.8, 1.0] or finer(found) == [0.6, 0.8]


def statistics_of(found: list, gamma: float) -> float:  # type: ignore[type-arg]
    one = next(one for one in found if one.gamma == gamma)
    return sum(one.times.values()) / len(one.times)


def test_an_optimum_at_an_edge_is_not_said() -> None:
    rows = named(critical(readings(trials(best=1.6), 64, 0.5), 2.0))
    assert rows["loss"].gamma is None and "widen --gammas" in rows["loss"].note
    one = named(critical(readings(trials(seeds=(1,)), 64, 0.5), 2.0))
    assert "one seed: not a finding" in one["loss"].note and math.isnan(one["loss"].low)


def test_rates_at_an_edge_and_without_a_loss() -> None:
    found = [one for one in trials() if one.rate < 0.3]
    _, warnings = best_rates(found)
    assert (
        len(warnings) == len(GAMMAS)
        and "gamma 0.4 at width 64: its best learning rate, 0.2, is the largest tried" in warnings[0]
    )
    lost = [Trial(0.5, 0.1, 1, 64, None, spikes=1)]
    rates, warnings = best_rates(lost)
    assert rates == {} and "no run ended with a loss: try lower learning rates" in warnings[0]
    with pytest.raises(ConfigurationError, match=r"gamma 0.5, the baseline, has no finished run at width 64"):
        readings(lost, 64, 0.5)
    # A rate without a loss on a seed that all rates have does not count; on one of its own, it is said.
    some = [*trials(), *(Trial(0.7, rate, 3, 64, None if rate == 0.2 else 9.0) for rate in (0.1, 0.2, 0.4))]
    assert best_rates(some)[0][64, 0.7] in (0.1, 0.4)
    rates, warnings = best_rates([*trials(), Trial(0.7, 0.2, 3, 64, None)])
    assert rates[64, 0.7] == 0.2 and any(
        "seeds 3 of its best learning rate, 0.2, have no loss" in one for one in warnings
    )
    # Rates are compared on the seeds that they share: another that only the best one has does not count against it.
    assert best_rates([*trials(), Trial(0.7, 0.2, 3, 64, 99.0)])[0][64, 0.7] == 0.2


def test_drift_is_where_the_exponent_over_widths_is_zero() -> None:
    found = [
        Trial(gamma, 0.2, 1, width, 3.0, distance=width ** (gamma - 0.75))
        for gamma in GAMMAS
        for width in (64, 128, 256)
    ]
    exponents, where = drift(found)
    assert exponents[0.9] == pytest.approx(0.15) and where.gamma == pytest.approx(0.75)
    assert drift([one for one in found if one.width < 200])[1].gamma is None


def test_rates_beyond_those_tried() -> None:
    """Half or twice where the best lies at an end, nothing where it lies inside or was the only one."""

    def trials(gamma: float, losses: dict[float, float | None]) -> list[Trial]:
        return [Trial(gamma, rate, 1, 64, loss) for rate, loss in losses.items()]

    found = [
        *trials(0.5, {0.002: 3.0, 0.004: 2.0, 0.008: 1.0}), *trials(0.75, {0.002: 2.0, 0.004: 1.0, 0.008: None}),
        *trials(1.0, {0.002: 1.0, 0.004: 2.0, 0.008: 3.0}), *trials(1.25, {0.002: 1.0}), *trials(1.5, {0.002: None}),
    ]  # fmt: skip
    assert beyond(found) == {(64, 0.5): 0.016, (64, 1.0): 0.001}


def test_arithmetic() -> None:
    assert (
        lowest({0.0: 4.0, 1.0: 1.0, 3.0: 1.0}) == (pytest.approx(2.0), True)
        or lowest({0.0: 4.0, 1.0: 1.0, 3.0: 1.0})[1]
    )
    exact = {x: (x - 0.83) ** 2 for x in (0.4, 0.7, 0.9, 1.2)}
    assert lowest(exact) == (pytest.approx(0.83), True)
    assert lowest({0.5: 1.0, 0.6: 2.0, 0.7: 3.0}) == (0.5, False)
    assert crossing({1.0: 0.5, 2.0: 1.5}, 1.0) == pytest.approx(1.5) and crossing({1.0: 0.5, 2.0: 0.6}, 1.0) is None
    assert tokens_to(((0.0, 6.0), (100.0, 4.0), (200.0, 3.0)), 5.0) == pytest.approx(50)
    assert tokens_to(((0.0, 6.0), (100.0, 4.0)), 3.0) == math.inf


@pytest.mark.ranks
@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize("rounds", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_the_search(tmp_path: Path, data_cache: str, capsys: pytest.CaptureFixture[str], rounds: str) -> None:
    base, output = tmp_path / "base.yaml", tmp_path / "critical"
    base.write_text(
        Path("configs/smoke.yaml").read_text().replace("corpus: tiny", f"corpus: tiny\n  cache: {data_cache}")
    )
    words = ["--config", str(base), "--gammas", "0.5", "0.8", "1.2", "--steps", "12"]
    # Of several rates and seeds, the seeds after the first have the best rate only.
    words += (
        ["--rates", "0.003", "--seeds", "1"] if rounds == "1" else ["--rates", "0.003", "0.006", "--seeds", "1", "2"]
    )
    words += ["--sequences", "2", "--rounds", rounds, "--output", str(output), "--margin", "9", "--widen", "0"]
    code = main(words)
    out = capsys.readouterr().out
    values = json.loads((output / "critical.json").read_text())
    rows = {row["reading"]: row for row in values["readings"]}
    assert set(rows) == {"loss", "balance", "context", "boundary", "stability", "drift"}
    assert code == (rows["loss"]["gamma"] is None), "an optimum at an edge is exit code 1"
    assert (len(values["gammas"]) >= 4) == (rounds == "2"), "a round more, between the best and its neighbours"
    assert all(one["contexts"] for one in values["gammas"]) and all(one["distances"] for one in values["gammas"])
    trials = (output / "trials.csv").read_text().splitlines()[1:]
    assert len(trials) == (3 if rounds == "1" else 3 * (len(values["gammas"])))
    assert f"== round {rounds}: gamma" in out and "tokens to the baseline's loss" in out
    assert (output / "critical.png").stat().st_size > 10_000
    with pytest.raises(ConfigurationError, match="holds another search"):
        main([*words, "--margin", "8"])
    if rounds == "2":
        # Twelve steps like the larger rate: each gamma gets one beyond it, in the same folder, which keeps what it has.
        main([*words[:-1], "1", "--rounds", "1"])
        assert "== round 1, wider: gamma 0.5 at 0.012" in (out := capsys.readouterr().out)
        assert "6 points, 6 finished" in out
        wider = [line.split(",")[:3] for line in (output / "trials.csv").read_text().splitlines()[1:]]
        assert ["0.5", "0.012", "1"] in wider and ["0.5", "0.012", "2"] in wider


def test_what_is_refused(tmp_path: Path) -> None:
    for words, message in (
        (["--gammas", "0.5", "1"], "give at least three, the baseline 0.5 among them"),
        (["--gammas", "0.6", "0.8", "1"], "the baseline 0.5 among them"),
        (["--widths", "40"], "--widths 40: must be a multiple of 32"),
        (["--steps", "3"], "at least 12 steps"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            main([*words, "--output", str(tmp_path / "x")])
