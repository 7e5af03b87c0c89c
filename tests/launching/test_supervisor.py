"""What the supervisor does about each end of an attempt.

A script of bash stands in for training here: it saves and ends as it is told, attempt by attempt. Real runs, under a real
SLURM, are in test_survival.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT

from megagamma.commands.fake_interrupt import main as fake_interrupt
from megagamma.commands.supervise import main, run_folder_of
from megagamma.errors import ConfigurationError, DistributedError
from megagamma.launching.attempts import Attempt, AttemptLog, failures, fingerprint, is_lost_peer, kind_of
from megagamma.launching.stacks import RankStack, read_stacks, silent_ranks
from megagamma.runs.folder import RunFolder

STAND_IN = r"""
ulimit -c 0
run=$1; shift
n=$(($(cat "$run/count" 2>/dev/null || echo 0) + 1)); echo $n > "$run/count"
save() { mkdir -p "$run/checkpoints/$(printf 'step_%08d' "$1")"; }
step() { echo "{\"step\": $1}" >> "$run/metrics.jsonl"; }
stop() { save "$1"; exit 75; }
echo "attempt $n"
eval "${!n:-exit 99}"
"""


def supervise(run: Path, *actions: str, options: tuple[str, ...] = (), **more: str) -> subprocess.Popen[str]:
    """Start a supervisor whose command does one action an attempt."""
    run.mkdir(exist_ok=True)
    script = run.parent / "stand_in.sh"
    script.write_text(STAND_IN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, "-m", "megagamma.commands", "supervise", "--folder", str(run), *options, "--", "bash",
         str(script), str(run), *actions],
        cwd=ROOT, env={**environment, **more}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, out + err


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in RunFolder(run).attempts().read() if line["event"] == event]


def ends(run: Path) -> list[tuple[str, int | None]]:
    return [(line["kind"], line["checkpoint"]) for line in lines(run, "end")]


def metrics_text(run: Path) -> str:
    file = run / "metrics.jsonl"
    return file.read_text() if file.exists() else ""


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("actions", "options", "code", "expected"),
    [
        (["exit 0"], (), 0, [("done", None)]),
        # Fixed by a user, not by another start.
        (["exit 2", "exit 0"], (), 2, [("refused", None)]),
        # A run that diverged is a result.
        (["save 4; exit 3", "exit 0"], (), 3, [("diverged", 4)]),
        (["exit 70", "save 4; exit 0"], (), 0, [("failed", None), ("done", 4)]),
        (
            ["save 2; kill -SEGV $$", "save 4; kill -ABRT $$", "save 6; kill -KILL $$", "exit 0"],
            (), 0, [("failed", 2), ("failed", 4), ("failed", 6), ("done", 6)],
        ),
        # Two failures in a row that came no further.
        (["exit 70", "exit 70", "exit 0"], (), 93, [("failed", None)] * 2),
        (["save 4; exit 1", "exit 1", "exit 1", "exit 0"], (), 93, [("failed", 4)] * 3),
        # Not in a row.
        (
            ["exit 1", "save 4; exit 1", "exit 1", "save 8; exit 0"],
            (), 0, [("failed", None), ("failed", 4), ("failed", 4), ("done", 8)],
        ),
        # Each comes further, and they are too many.
        ([f"save {n}; exit 70" for n in (1, 2, 3)], ("--max_failures", "3"), 93, [("failed", n) for n in (1, 2, 3)]),
    ],
)  # fmt: skip
def test_what_follows_an_exit_code(
    tmp_path: Path, actions: list[str], options: tuple[str, ...], code: int, expected: list[Any]
) -> None:
    run = tmp_path / "run"
    found, said = outcome(supervise(run, *actions, options=options))
    assert (found, ends(run)) == (code, expected), said
    assert [line["attempt"] for line in lines(run, "start")] == list(range(1, len(expected) + 1))
    for number in range(1, len(expected) + 1):
        assert (run / "logs" / f"attempt-{number}" / "rank-0.log").read_text() == f"attempt {number}\n"
        assert f"attempt {number}\n" in said, "repeated on the console"
    assert ("not started again" in said) == (code == 93)


def test_a_new_chain_counts_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert outcome(supervise(run, "exit 70", "exit 70", "exit 70", "exit 0"))[0] == 93
    assert outcome(supervise(run, "exit 70", "exit 70", "exit 70", "exit 0"))[0] == 0
    assert [kind for kind, _ in ends(run)] == ["failed", "failed", "failed", "done"]


def test_a_finished_run_is_not_started_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    end = """echo '{"event": "start"}' >> "$run/events.jsonl"; echo '{"event": "end"}' >> "$run/events.jsonl"; exit 0"""
    assert outcome(supervise(run, end))[0] == 0
    code, said = outcome(supervise(run, end))
    assert code == 0 and "trained to its end already" in said and len(lines(run, "start")) == 1
    # Another command, such as one with more steps, is not the same run.
    assert outcome(supervise(run, end, "exit 0"))[0] == 0
    assert len(lines(run, "start")) == 2


def test_a_crash_after_the_end_is_none(tmp_path: Path) -> None:
    """Only an end of this attempt counts: the second one here crashes before it begins."""
    run = tmp_path / "run"
    end = """echo '{"event": "end"}' >> "$run/events.jsonl"; kill -SEGV $$"""
    assert outcome(supervise(run, end))[0] == 0
    assert outcome(supervise(run, end, "kill -SEGV $$", "exit 0"))[0] == 0
    assert [kind for kind, _ in ends(run)] == ["done", "failed", "done"]


def test_signals(tmp_path: Path) -> None:
    """Without SLURM a preemption saves and starts again, and SIGTERM saves and leaves; preemptions are no failures."""
    run = tmp_path / "run"
    waits = "trap 'stop {}' USR1; step {}; while :; do sleep 0.05; done"
    process = supervise(
        run, waits.format(3, 3), waits.format(5, 5), waits.format(6, 6), options=("--max_failures", "1")
    )
    for number, name in ((3, signal.SIGUSR1), (5, signal.SIGUSR1), (6, signal.SIGTERM)):
        line = f'{{"step": {number}}}'
        until(lambda line=line: line in metrics_text(run))  # type: ignore[misc]
        process.send_signal(name)
    code, said = outcome(process)
    assert code == 75, said
    assert ends(run) == [("preempted", 3), ("preempted", 5), ("stopped", 6)]
    assert [line["signal"] for line in lines(run, "signal")] == ["SIGUSR1", "SIGUSR1", "SIGTERM"]


def test_a_fake_preemption_of_a_supervisor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    process = supervise(run, "trap 'stop 3' USR1; step 3; while :; do sleep 0.05; done", "exit 0")
    until(lambda: "3" in metrics_text(run))
    assert fake_interrupt(["preemption", "--folder", str(run)]) == 0
    assert "saved and stopped after" in capsys.readouterr().out
    assert outcome(process)[0] == 0
    assert [kind for kind, _ in ends(run)] == ["preempted", "done"]


def test_a_signal_that_came_before_the_supervisor(tmp_path: Path) -> None:
    """Batch scripts hand it over: nothing is started in a job that is about to end."""
    run = tmp_path / "run"
    assert outcome(supervise(run, "exit 0", options=("--preempted",)))[0] == 75
    assert lines(run, "start") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folder", "r"], "COMMAND: is missing"),
        (["--folder", "r", "--max_failures", "0", "--", "true"], "--max_failures=0: must be 1 or more"),
        (["--folder", "r", "--hang_minutes", "-1", "--", "true"], "--hang_minutes=-1: must be 0 (never) or more"),
        (["--", "true"], "--folder: the COMMAND is not megagamma/pretrain.py"),
        (["--", "python", "pretrain.py", "--model.hiden_size", "3"], "hiden_size"),
    ],
)
def test_refusals(words: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        main(words)
    assert said in str(error.value)


def test_the_folder_is_that_of_the_config(tmp_path: Path) -> None:
    command = ["srun", "python", "x/pretrain.py", "--config", str(ROOT / "configs" / "smoke.yaml")]
    assert run_folder_of(command) == Path("runs/smoke")
    assert run_folder_of([*command, "--run.folder", "other"]) == Path("other")
    assert run_folder_of([*command, "--run.folder", "r/{name}", "--run.name", "n"]) == Path("r/n")


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no-such-program: cannot be started \(No such file"):
        main(["--folder", str(tmp_path / "run"), "--", "no-such-program"])
    assert ends(tmp_path / "run") == [("refused", None)]


def test_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = supervise(run, "trap '' USR1; step 1; while :; do sleep 0.05; done")
    until((run / "metrics.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    until(lambda: lines(run, "signal"))
    process.send_signal(signal.SIGTERM)
    assert outcome(process)[0] == 75
    assert ends(run) == [("stopped", None)]


def test_a_hang_without_stacks(tmp_path: Path) -> None:
    """Killed, and counted as a failure; a run whose steps or saves go on is left alone."""
    run = tmp_path / "run"
    slow = "for i in 1 2 3 4 5 6; do sleep 0.5; step $i; done; mkdir -p $run/checkpoints/.step_1.partial; " + (
        "for i in 1 2 3 4 5; do sleep 0.5; echo x >> $run/checkpoints/.step_1.partial/f; done; exit 0"
    )
    code, said = outcome(supervise(run, "step 0; sleep 100", slow, options=("--hang_minutes", "0.03")))
    assert code == 0, said
    assert [kind for kind, _ in ends(run)] == ["hung", "done"]
    assert "no step, event or checkpoint" in said and lines(run, "hang")[0]["of"] == 0


RANK = """
import os, sys, time, threading
from megagamma.launching.stacks import offer_stacks
offer_stacks()
def wait():
    time.sleep(100)
def busy():
    open(sys.argv[1], "w").close()
    time.sleep(100)
threading.Thread(target=wait, daemon=True).start()
busy()
"""


@pytest.mark.parametrize("way", ["stopped", "asleep"])
def test_the_silent_rank_is_named(tmp_path: Path, way: str) -> None:
    """Real processes with real stacks; `torch/distributed/` is the folder of the file in which the others wait."""
    folder = tmp_path / "torch" / "distributed"
    folder.mkdir(parents=True)
    (folder / "rank.py").write_text(RANK)
    (tmp_path / "mine.py").write_text(RANK)
    run = tmp_path / "run"
    ranks = " ".join(
        f"RANK={rank} {sys.executable} {tmp_path / 'mine.py' if rank == 1 and way == 'asleep' else folder / 'rank.py'} "
        f"$run/ready-{rank} &"
        for rank in range(3)
    )
    action = f"{ranks} wait; exit 1"
    process = supervise(run, action, "exit 0", options=("--hang_minutes", "0.25"), PYTHONPATH=str(ROOT))
    until(lambda: len(list(run.glob("ready-*"))) == 3)
    if way == "stopped":
        pid = next(stack.pid for stack in read_stacks(run / "logs" / "attempt-1") if stack.rank == 1)
        os.kill(pid, signal.SIGSTOP)
    code, said = outcome(process)
    assert code == 0, said
    (hang,) = lines(run, "hang")
    assert (hang["ranks"], hang["answered"], hang["of"]) == ([1], 2 if way == "stopped" else 3, 3)
    assert "1 of 3 ranks hold up the others: rank 1 on" in said
    assert ("gave no stack" in said) if way == "stopped" else ("is in busy" in said)


def test_ranks_that_wait_for_the_device_are_compared() -> None:
    def stack(rank: int, *functions: str) -> RankStack:
        return RankStack(rank, f"rank {rank}", "", 1, tuple(("x.py", name) for name in functions))

    same = [stack(rank, "item", "any_rank") for rank in (0, 1, 3)]
    assert silent_ranks([*same, stack(2, "read", "batch")]) == [stack(2, "read", "batch")]
    assert silent_ranks(same) == [], "nobody stands out"
    assert silent_ranks([stack(0, "a"), stack(1, "b")]) == []


def test_kinds_and_counts(tmp_path: Path) -> None:
    assert kind_of(2, None, tmp_path) == "refused"
    from megagamma.distributed.peers import explain_peer_failure

    with pytest.raises(DistributedError) as lost, explain_peer_failure(30):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    (tmp_path / "rank-0.log").write_text(f"error: rank 1: {lost.value}\n")
    assert is_lost_peer(tmp_path) and kind_of(2, None, tmp_path) == "failed"
    (tmp_path / "rank-1.log").write_text("error: out of memory (of the host): use a smaller model\n")
    assert not is_lost_peer(tmp_path) and kind_of(2, None, tmp_path) == "refused"
    # Asked to stop, and killed before it listened.
    assert kind_of(138, "preempted", tmp_path) == "preempted"
    assert kind_of(3, "preempted", tmp_path) == "diverged"

    def attempt(kind: Any, before: int | None, after: int | None) -> Attempt:
        return Attempt(1, "", "", kind, 1, before, after)

    assert failures([attempt("failed", None, None), attempt("preempted", None, 3), attempt("lost", 3, 3)]) == (2, 1)
    assert failures([attempt("failed", 3, 3), attempt("preempted", 3, 3), attempt("hung", 3, 3)]) == (2, 2)
    # It went back to an earlier checkpoint.
    assert failures([attempt("failed", 8, 6)]) == (1, 1)


def test_attempts_without_an_end(tmp_path: Path) -> None:
    """Lost with its node, or killed after a signal; the checkpoint is what the next one found."""
    events: list[dict[str, Any]] = [
        {"event": "start", "attempt": 1, "chain": "job 1", "checkpoint": None},
        {"event": "start", "attempt": 2, "chain": "job 1", "checkpoint": 5},
        {"event": "signal", "attempt": 2, "kind": "preempted"},
        {"event": "start", "attempt": 3, "chain": "job 1", "checkpoint": 8},
    ]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "en')
    (tmp_path / "checkpoints" / "step_00000009").mkdir(parents=True)
    found = AttemptLog(RunFolder(tmp_path)).read()
    assert [(one.kind, one.before, one.after) for one in found] == [
        ("lost", None, 5),
        ("preempted", 5, 8),
        ("lost", 8, 9),
    ]


def test_the_fingerprint_is_of_what_is_trained(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("run: {steps: 20}\n")
    one = fingerprint(["srun", "--nodes=2", "python", "/a/pretrain.py", "--config", str(config)])
    assert fingerprint(["torchrun", "/b/pretrain.py", "--config", str(config)]) == one
    assert fingerprint(["torchrun", "/b/pretrain.py", "--config", str(config), "--run.steps", "40"]) != one
    config.write_text("run: {steps: 40}\n")
    assert fingerprint(["torchrun", "/b/pretrain.py", "--config", str(config)]) != one
