"""Gains by token: hand-made tables with known answers, the losses of a real model, and what may not be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exports import SHAPE
from support.ranks import RankPool
from support.train import run_trainer

from megagamma.commands.compare_tokens import main
from megagamma.dynamics.rebuilt import rebuilt
from megagamma.dynamics.token_gains import another_seed, copied, gains, kind_of_piece
from megagamma.dynamics.token_losses import SHORT, TokenLosses, of_checkpoint, read
from megagamma.errors import MegagammaError

SPLIT_BY_CONTEXT = "context gain of the baseline"
PIECES = ["<unk>", "\u2581the", "\u2581cat", "s", "\u25817", "\u2581my_name", "."]


def table(full: np.ndarray, labels: np.ndarray, short: float = 2.0) -> TokenLosses:
    tokens = np.roll(labels, 1, axis=1)
    return TokenLosses(1, tokens, labels, full.astype(np.float32), np.full_like(full, short, dtype=np.float32), "x")


def test_kinds() -> None:
    kinds = [kind_of_piece(piece) for piece in PIECES[1:]]
    assert kinds == ["function word", "word start", "inside of a word", "digit", "code identifier", "other"]
    assert kind_of_piece("the") == "inside of a word" and kind_of_piece("\u2581getValue") == "code identifier"


def test_copied() -> None:
    tokens, labels = np.array([[1, 2, 1, 2, 1]]), np.array([[2, 1, 2, 3, 2]])
    assert copied(tokens, labels).tolist() == [[False, False, True, False, True]]


def test_a_planted_gain_is_found_where_it_was_planted() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(1, 7, (40, 50))
    first = generator.uniform(0.2, 0.9, labels.shape)
    # Digits are half a nat better; nothing else is, but for noise.
    second = first - np.where(labels == 4, 0.5, 0.0) + generator.normal(0, 0.05, labels.shape)
    second[0, :10] = np.nan  # masked
    rows = {(row.split, row.kind): row for row in gains(table(first, labels), table(second, labels), PIECES)}
    digit, whole = rows["token", "digit"], rows["all", "all tokens"]
    assert digit.gain == pytest.approx(0.5, abs=0.01) and 0.005 < digit.high - digit.low < 0.02
    assert whole.tokens == 40 * 50 - 10 and whole.gain == pytest.approx(0.5 * digit.share, abs=0.01)
    for kind in ("word start", "other", "function word"):
        assert abs(rows["token", kind].gain) < 0.02
        assert rows["token", kind].low < rows["token", kind].gain < rows["token", kind].high
    assert sum(row.tokens for key, row in rows.items() if key[0] == "token") == whole.tokens
    # The interval is of the sequences: with one that stands out it is wide.
    second[5] += 20
    wide = next(row for row in gains(table(first, labels), table(second, labels), PIECES) if row.split == "all")
    assert wide.high - wide.low > 5 * (whole.high - whole.low)


def test_a_judge_of_another_seed_finds_no_gain_in_noise() -> None:
    """Models that differ by noise alone: by its own losses the baseline is behind where they are high, by a third's not."""
    generator = np.random.default_rng(1)
    labels = generator.integers(1, 7, (800, 50))
    truth = generator.uniform(0.0, 6.0, labels.shape)
    first, second, third = (table(truth + generator.normal(0, 0.5, labels.shape), labels, 3.5) for _ in range(3))

    def of(judge: TokenLosses | None) -> dict[str, tuple[float, float]]:
        rows = gains(first, second, PIECES, judge=judge)
        return {row.kind: (row.low, row.high) for row in rows if row.split in ("baseline loss", SPLIT_BY_CONTEXT)}

    own, other = of(None), of(third)
    assert own["3 nats and more"][0] > 0.02 and own["1 nats and more"][1] < -0.02
    for kind in ("3 nats and more", "1 nats and more"):
        assert max(map(abs, other[kind])) < 0.02
    assert another_seed(3, {1: first, 2: second, 3: third}) is first
    assert another_seed(2, {1: first, 2: second, 3: third}) is third
    assert another_seed(2, {2: second}) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    found = [root / "a", root / "b"]
    for gamma, folder in zip(("0.5", "0.9"), found, strict=True):
        given = ["--init.gamma", gamma, "--run.folder", str(folder), "--data.cache", data_cache, "--run.steps", "4"]
        assert one_rank.run(run_trainer, [*SHAPE, *given]) == [0]
    return found


def short_by_hand(folder: str, row: int, place: int) -> float:
    """The loss after the last `SHORT` tokens as a sequence of its own."""
    from megagamma.data.contracts import Batch

    with rebuilt(Path(folder)) as (engine, data):
        batch = next(iter(data.validation.values())).batch([row])
        window = slice(place + 1 - SHORT, place + 1)
        tokens, labels = batch.tokens[:, window], batch.labels[:, window]
        alone = Batch(tokens, labels, torch.ones(1, SHORT), torch.arange(SHORT)[None])
        (losses,) = engine.run([alone], lambda output, _: output.float(), needs="loss")
        return float(losses[0, -1])


def losses_of(folder: str, keep: str) -> TokenLosses:
    return of_checkpoint(Path(folder), 3, Path(keep))


def test_losses_of_a_model(runs: list[Path], tmp_path: Path, one_rank: RankPool) -> None:
    checkpoint = runs[0] / "checkpoints" / "step_00000004"
    keep = tmp_path / "kept.npz"
    (found,) = one_rank.run(losses_of, str(checkpoint), str(keep))
    assert found.full.shape == found.short.shape == (3, 48) and np.isfinite(found.full).all()
    assert np.array_equal(found.full[:, :SHORT], found.short[:, :SHORT])
    for row, place in ((1, SHORT), (2, 30)):
        (by_hand,) = one_rank.run(short_by_hand, str(checkpoint), row, place)
        assert found.short[row, place] == pytest.approx(by_hand, rel=1e-5)
        assert found.full[row, place] != pytest.approx(by_hand, rel=1e-4)
    assert np.array_equal(read(keep).full, found.full)
    keep.write_bytes(keep.read_bytes()[:100])
    with pytest.raises(MegagammaError, match="delete it, and it is measured again"):
        read(keep)


def compare(arguments: list[str]) -> int:
    return main(arguments)


def test_the_command(runs: list[Path], tmp_path: Path, one_rank: RankPool) -> None:
    output = tmp_path / "gains.html"
    words = [*map(str, runs), "--sequences", "4", "--output", str(output)]
    assert one_rank.run(compare, words) == [0]
    text, numbers = output.read_text(), output.with_suffix(".csv").read_text()
    assert text.count("class='passage'") == 4 and "gain " in text and "95 % interval" in text
    assert numbers.splitlines()[0] == "split,kind,tokens,share,baseline,gain,low,high"
    # A third run tells kinds apart; the gain on all tokens is what it was.
    judged = tmp_path / "judged.html"
    assert one_rank.run(compare, [*words[:-1], str(judged), "--judge", str(runs[1])]) == [0]
    lines = judged.with_suffix(".csv").read_text().splitlines()
    assert lines[1] == numbers.splitlines()[1] and lines[2:] != numbers.splitlines()[2:]
    kept = runs[1] / "tokens" / "step_00000004.npz"
    before = kept.stat().st_mtime_ns
    assert one_rank.run(compare, words) == [0] and kept.stat().st_mtime_ns == before, "nothing is measured twice"


def test_what_does_not_compare(runs: list[Path], tmp_path: Path) -> None:
    labels = np.ones((2, 5), dtype=int)
    one = table(np.ones((2, 5)), labels)
    with pytest.raises(MegagammaError, match=r"different tokenizers.*bits per byte"):
        gains(one, replace(one, tokenizer="y"), PIECES)
    with pytest.raises(MegagammaError, match="different held-out tokens"):
        gains(one, table(np.ones((2, 5)), labels + 1), PIECES)
    with pytest.raises(MegagammaError, match=r"has no checkpoint of step 9: it has 4"):
        main([*map(str, runs), "--step", "9"])
    with pytest.raises(MegagammaError, match="must be at least 2"):
        main([*map(str, runs), "--sequences", "1"])
