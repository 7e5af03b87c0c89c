"""kill -9 of one rank at random points of saves, again and again: every resume works, on another layout each time."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.forked import launch
from support.processes import attempt, losses, metrics
from support.ranks import RankPool

from megagamma.checkpoint.reader import read_manifest, steps_saved, verify

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("forked")]

LAYOUTS = [
    ("--parallel.tensor", "2"),
    ("--parallel.pipeline", "2"),
    ("--deepspeed_config", "configs/deepspeed/zero2.json"),
    ("--deepspeed_config", "configs/deepspeed/zero3.json"),
]


def arguments(folder: Path, cache: str, *more: str) -> list[str]:
    """5 million parameters: a save of 60 MB takes longer than the look at the folder that finds it."""
    return [
        *("--run.folder", str(folder), "--data.cache", cache, "--run.threads", "1"),
        *("--model.hidden_size", "384", "--model.num_layers", "2", "--model.ffn_hidden_size", "1536"),
        *("--data.global_batch_size", "2", "--data.micro_batch_size", "1", "--data.sequence_length", "16"),
        *("--validation.interval", "0", "--validation.at_end", "false", "--logging.sample_tokens", "0"),
        *("--logging.wandb", "disabled", "--checkpoint.interval", "1", "--checkpoint.keep_last", "2"),
        *("--optimizer.lr", "0.0001", "--run.start_minutes", "1", *more),
    ]


def fresh_partial(root: Path, stale: set[str]) -> bool:
    return root.is_dir() and any(path.name not in stale for path in root.glob(".step_*.partial"))


@pytest.mark.parametrize(
    ("kills", "longest_delay"),
    [
        # Soon after a save has begun, so that few kills are enough to interrupt one.
        (4, 0.02),
        # A save takes 0.05 to 0.3 s.
        pytest.param(20, 0.15, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_one_rank_killed_at_random_points_of_saves(
    tmp_path: Path, data_cache: str, one_rank: RankPool, kills: int, longest_delay: float
) -> None:
    rng = random.Random(7)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = ("--run.steps", str(3 * kills + 4))
    assert one_rank.run(attempt, arguments(whole, data_cache, *steps), True)[0] == ("", 0, "")
    root, log = broken / "checkpoints", tmp_path / "log"
    in_a_save, resumed = 0, 0
    for kill in range(kills):
        asynchronous = kill % 4 == 3
        more = (*steps, *LAYOUTS[kill % len(LAYOUTS)], "--checkpoint.asynchronous", str(asynchronous).lower())
        stale = {path.name for path in root.glob(".step_*")} if root.is_dir() else set()
        before = steps_saved(root)
        ranks = launch(2, arguments(broken, data_cache, *more), log)
        # The first, second or third save of this start (the second or third of the first start, so that there is
        # something to resume from), and a point of it.
        deadline = time.monotonic() + 120
        least = before[-1] + rng.randrange(3) if before else rng.randrange(1, 3)
        while not (fresh_partial(root, stale) and max([0, *steps_saved(root)]) >= least):
            assert all(rank.is_alive() for rank in ranks), log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, longest_delay))
        target = ranks[rng.randrange(2)]
        target.kill()
        for rank in ranks:
            rank.join(60)
            assert not rank.is_alive(), "the other rank ends by itself, with no launcher to end it"
        assert target.exitcode == -9
        survivor = next(rank for rank in ranks if rank is not target)
        assert survivor.exitcode == 2
        said = log.read_text()
        assert "another rank ended" in said and "Traceback" not in said, said[-3000:]
        log.unlink()

        in_a_save += any(path.name not in stale for path in root.glob(".step_*.partial"))
        saved = steps_saved(root)
        for step in saved:
            verify(root / f"step_{step:08d}", read_manifest(root / f"step_{step:08d}"))
        newest, reached = max([0, *saved]), metrics(broken)[-1]["step"]
        # One interval; while an asynchronous save is being written the one before it counts, hence two.
        assert newest >= reached - (2 if asynchronous else 1), f"kill {kill}: at step {reached}, saved {saved}"
        assert newest >= max([0, *before]), "nothing that was saved is lost"
        resumed += bool(before)
    assert in_a_save >= kills // 2, f"only {in_a_save} of {kills} kills met a save"
    assert resumed == kills - 1

    assert one_rank.run(attempt, arguments(broken, data_cache, *steps), True)[0] == ("", 0, "")
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)
    assert not list(root.glob(".step_*")), "what the kills left is gone"
    # Negative controls: the losses differ from step to step by more than they may differ here.
    assert min(abs(a / b - 1) for a, b in zip(losses(whole)[1:], losses(whole), strict=False)) > 2e-5


def test_a_silent_rank_is_given_up(tmp_path: Path, data_cache: str) -> None:
    """A rank that hangs, and holds its connections, is waited for as long as the config says."""
    log, folder = tmp_path / "log", tmp_path / "run"
    more = ("--run.timeout_minutes", "0.1", "--run.steps", "100000", "--checkpoint.interval", "0")
    ranks = launch(2, arguments(folder, data_cache, *more), log)
    end = time.monotonic() + 120
    while len(metrics(folder)) < 2:
        assert all(rank.is_alive() for rank in ranks) and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.01)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        ranks[0].join(60)
        assert ranks[0].exitcode == 2
    finally:
        ranks[1].kill()
        ranks[1].join()
    said = log.read_text()
    assert "gave no answer within run.timeout_minutes=0.1" in said and "Traceback" not in said, said[-3000:]
