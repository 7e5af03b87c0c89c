"""The same run under every launcher; and no launcher is left waiting for a rank that died."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from support.processes import attempt, finish, losses, metrics, start, wait_until
from support.ranks import RankPool

from megagamma.checkpoint.reader import steps_saved

pytestmark = pytest.mark.launcher


def arguments(folder: Path, data_cache: str, steps: int) -> list[str]:
    """With a learning rate that does not depend on the number of steps."""
    return [
        *("--run.folder", str(folder), "--data.cache", data_cache, "--run.steps", str(steps)),
        *("--schedule.shape", "constant", "--schedule.warmup_steps", "2", "--logging.sample_tokens", "0"),
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str) -> list[float]:
    """Losses of the run on a single process."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert one_rank.run(attempt, arguments(folder, data_cache, 6), True)[0] == ("", 0, "")
    return losses(folder)


def same_losses(folder: Path, reference: list[float]) -> None:
    assert losses(folder)[:6] == pytest.approx(reference, rel=1e-5)
    assert reference[0] - reference[-1] > 0.1


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """The running ranks below a launcher's process, by rank."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            rank = process.environ().get("RANK")
            if rank is not None and any(word.endswith("pretrain.py") for word in process.cmdline()):
                found[int(rank)] = process
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [pytest.param("python", 1, marks=pytest.mark.slow), pytest.param("deepspeed", 2, marks=pytest.mark.slow)],
)
def test_a_run_to_its_end(tmp_path: Path, data_cache: str, reference: list[float], launcher: str, ranks: int) -> None:
    folder = tmp_path / "run"
    code, out, err = finish(start(arguments(folder, data_cache, 6), launcher), 200)
    assert code == 0, err[-3000:]
    assert f"on {ranks} x cpu" in out
    same_losses(folder, reference)
    assert steps_saved(folder / "checkpoints") == [6]
    assert out.count("done: 6 steps") == 1, "one rank speaks"


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "deepspeed"])
def test_rank_that_dies_ends_the_run(tmp_path: Path, data_cache: str, reference: list[float], launcher: str) -> None:
    folder = tmp_path / "run"
    process = start(arguments(folder, data_cache, 100_000), launcher)
    wait_until(lambda: len(metrics(folder)) >= 6, process, 120)
    ranks = ranks_of(process.pid)
    # Negative control: that many processes do take part.
    assert sorted(ranks) == [0, 1]
    ranks[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    code, out, _ = finish(process)
    assert code != 0
    assert time.monotonic() - begin < 100
    assert not ranks[0].is_running() or ranks[0].status() == psutil.STATUS_ZOMBIE
    assert "on 2 x cpu" in out and "data 2," in out
    same_losses(folder, reference)


def test_signal_to_the_launcher_saves(tmp_path: Path, data_cache: str, reference: list[float]) -> None:
    """What a scheduler does at the end of the time that it gave: the ranks are told, and save."""
    folder = tmp_path / "run"
    process = start(arguments(folder, data_cache, 100_000), "torchrun")
    wait_until(lambda: len(metrics(folder)) >= 6, process, 120)
    os.kill(process.pid, signal.SIGTERM)
    code, out, _ = finish(process)
    assert code != 0
    assert "on 2 x cpu" in out and "data 2," in out
    assert out.count("stopped by SIGTERM at step") == 1, "one rank speaks"
    assert steps_saved(folder / "checkpoints") == [metrics(folder)[-1]["step"]]
    same_losses(folder, reference)
