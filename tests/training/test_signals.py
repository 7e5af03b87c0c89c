"""A run that is asked to stop saves, says so by its exit code, and goes on as if it had not been stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT, attempt, attempt_with_signal, finish, losses, metrics, start, wait_until
from support.ranks import RankPool

from megagamma.checkpoint.reader import steps_saved

STEPS = 40


def arguments(folder: Path, data_cache: str) -> list[str]:
    return [
        *("--run.folder", str(folder), "--data.cache", data_cache, "--run.steps", str(STEPS), "--run.threads", "1"),
        *("--validation.interval", "0", "--logging.sample_tokens", "0"),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str) -> list[float]:
    """Losses of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert one_rank.run(attempt, arguments(folder, data_cache), True)[0] == ("", 0, "")
    found = losses(folder)
    assert len(found) == STEPS
    assert found[0] - found[-1] > 0.5
    return found


def stopped_well(folder: Path, name: str) -> int:
    """The step at which a run was stopped, held against its checkpoint and its events."""
    last = metrics(folder)[-1]["step"]
    assert 3 <= last < STEPS, "stopped on the way"
    assert steps_saved(folder / "checkpoints") == [last]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["signal"]) for event in events if event["event"] == "stopped"] == [(last, name)]
    return last


@pytest.mark.launcher
def test_sigterm_to_the_command_line(tmp_path: Path, data_cache: str, one_rank: RankPool, whole: list[float]) -> None:
    folder = tmp_path / "run"
    process = start(arguments(folder, data_cache))
    wait_until(lambda: len(metrics(folder)) >= 3, process)
    os.kill(process.pid, signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 75, err
    last = stopped_well(folder, "SIGTERM")
    assert f"stopped by SIGTERM at step {last}; saved: the same command resumes" in out
    assert "Traceback" not in err
    assert one_rank.run(attempt, arguments(folder, data_cache), True)[0] == ("", 0, "")
    assert losses(folder) == whole, "each step once, to the bit"


# SIGTERM reaches the command line above, SIGUSR1 one of two ranks below.
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(
            pytest.param(number, marks=pytest.mark.slow)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
        ),
    ],
)
def test_signal(
    tmp_path: Path, data_cache: str, one_rank: RankPool, whole: list[float], number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    found = one_rank.run(attempt_with_signal, arguments(folder, data_cache), number, 0, 3)[0]
    assert found == ("", 75, "")
    stopped_well(folder, number.name)
    assert one_rank.run(attempt, arguments(folder, data_cache), True)[0] == ("", 0, "")
    assert losses(folder) == whole


def test_signal_to_one_rank_stops_all(tmp_path: Path, data_cache: str, two_ranks: RankPool, whole: list[float]) -> None:
    """And the rank that speaks is not the one that was signalled."""
    folder = tmp_path / "run"
    found = two_ranks.run(attempt_with_signal, arguments(folder, data_cache), signal.SIGUSR1, 1, 3)
    assert found == [("", 75, "")] * 2
    last = metrics(folder)[-1]["step"]
    assert 3 <= last < STEPS
    assert steps_saved(folder / "checkpoints") == [last]
    assert two_ranks.run(attempt, arguments(folder, data_cache), True) == [("", 0, "")] * 2
    assert losses(folder) == pytest.approx(whole, rel=1e-5)


def test_finished_run_is_left_alone(tmp_path: Path, data_cache: str, one_rank: RankPool) -> None:
    folder = tmp_path / "run"
    given = [*arguments(folder, data_cache), "--run.steps", "3"]
    assert one_rank.run(attempt, given, True)[0] == ("", 0, "")
    before = [(line["step"], line["loss"]) for line in metrics(folder)]
    assert one_rank.run(attempt, given, True)[0] == ("", 0, "")
    assert [(line["step"], line["loss"]) for line in metrics(folder)] == before
    assert steps_saved(folder / "checkpoints") == [3]


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (["SIGTERM"], 0, "SIGTERM"),
        # Schedulers send it more than once.
        (["SIGUSR1", "SIGUSR1"], 0, "SIGUSR1"),
        (["SIGTERM", "SIGUSR1"], 0, "SIGUSR1"),
        # The one announces the other; a scheduler may send both at once, in any order.
        (["SIGUSR1", "SIGTERM"], 0, "SIGTERM"),
        (["SIGUSR1", "SIGTERM", "SIGTERM"], 143, None),
        (["SIGTERM", "SIGUSR1", "SIGTERM"], 143, None),
        # Who asks twice does not want to wait for the checkpoint.
        (["SIGTERM", "SIGTERM"], 143, None),
        (["SIGINT", "SIGINT"], 130, None),
        # A terminal that closes sends it twice; a limit of CPU time does each second.
        (["SIGHUP", "SIGHUP", "SIGXCPU", "SIGXCPU"], 0, "SIGXCPU"),
        (["SIGTERM", "SIGHUP"], 0, "SIGHUP"),
        (["SIGHUP", "SIGTERM"], 143, None),
    ],
)
def test_second_signal_leaves_at_once(sent: list[str], code: int, said: str | None) -> None:
    program = (
        "import os, signal\nfrom megagamma.training.signals import StopSignals\nwatch = StopSignals()\n"
        + "".join(f"os.kill(os.getpid(), signal.{name})\n" for name in sent)
        + "print(watch.received)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == code, found.stderr
    assert found.stdout == ("" if said is None else f"{said}\n")


@pytest.mark.parametrize(("ignored", "said"), [(True, "None"), (False, "SIGHUP")])
def test_a_hangup_that_was_ignored_stays_ignored(ignored: bool, said: str) -> None:
    """As under nohup; and without it the run is asked to stop."""
    program = (
        "import os, signal\nfrom megagamma.training.signals import StopSignals\nwatch = StopSignals()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\nprint(watch.received)\n"
        "watch.restore()\nprint(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)\n"
    )
    command = [*(["nohup"] if ignored else []), sys.executable, "-c", program]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, f"{said}\n{ignored}\n")


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU"])
def test_hangup_and_limit_of_cpu_time_to_the_command_line(tmp_path: Path, data_cache: str, name: str) -> None:
    folder = tmp_path / "run"
    process = start(arguments(folder, data_cache))
    wait_until(lambda: len(metrics(folder)) >= 3, process)
    os.kill(process.pid, signal.Signals[name])
    code, _, err = finish(process)
    assert code == 75, err
    stopped_well(folder, name)
