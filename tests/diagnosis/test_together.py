"""What the doctor finds between real ranks: a rank that hangs, a clock that is off, a slow link are named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankPool, free_port

from megagamma.diagnosis.findings import Finding
from megagamma.diagnosis.network import slow_links

ROOT = Path(__file__).resolve().parents[2]


def examined(place: str, fault: str) -> tuple[list[dict[str, Any]], float]:
    """Findings of one rank of a pool, and the seconds that they took; rank 1 has the fault."""
    import datetime

    import torch
    import torch.distributed as dist

    from megagamma.config.io import parse_config
    from megagamma.diagnosis import examination, network
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment

    world = world_from_environment()
    Runtime(parse_config(["--config", "configs/smoke.yaml"], world_size=world.size), world)
    begin = time.perf_counter()
    store, seconds = dist.FileStore(place, world.size), 2.0
    meeting = network.Meeting(store, world.rank, [f"node{rank}" for rank in range(world.size)], seconds)
    group = dist.new_group(list(range(world.size)), timeout=datetime.timedelta(seconds=seconds))
    clock, reduce = network.check_clock, network.check_collective
    try:
        if world.rank == 1:
            if fault == "hangs before":
                meeting.enter("its own checks")
                time.sleep(2 * seconds)
            elif fault == "clock":
                network.check_clock = lambda meeting: clock(meeting, lambda: time.time() + 90)
            elif fault == "hangs in the collective":
                network.check_collective = lambda meeting, *_: hang_until(meeting, "report:0")
        alone = [Finding("disk", "FAIL", "cannot be written")] if fault == "disk" and world.rank else []
        found = examination.examine_together(meeting, alone, torch.device("cpu"), 1, lambda: group)
    finally:
        network.check_clock, network.check_collective = clock, reduce
        dist.destroy_process_group(group)
    return [one.as_json() for one in found], time.perf_counter() - begin


def hang_until(meeting: Any, key: str) -> list[Finding]:
    """No finding, once another rank has set a key: as late as that rank's deadline, on a busy machine too."""
    while not meeting.store.check([key]):
        time.sleep(0.01)
    return []


def failures(found: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    return [(one["check"], one["rank"], one["host"]) for one in found if one["status"] == "FAIL"]


def test_ranks_that_are_well(two_ranks: RankPool, tmp_path: Path) -> None:
    (found, _), _ = two_ranks.run(examined, str(tmp_path / "store"), "")
    assert all(one["status"] == "OK" for one in found), found
    assert sorted(one["check"] for one in found) == ["clock", "collective", "collective", "links", "links"]
    collective = next(one for one in found if one["check"] == "collective")["values"]
    # 2 (n - 1) / n x 1 MiB in that time.
    assert collective["bytes_per_second"] * collective["seconds"] == pytest.approx(2**20)


def test_a_rank_that_does_not_come_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    (found, seconds), _ = two_ranks.run(examined, str(tmp_path / "store"), "hangs before")
    assert failures(found) == [("ranks", 1, "node1")]
    assert "within 2 s; it is at: its own checks" in found[-1]["text"] and "look at node1" in found[-1]["fix"]
    assert seconds < 8


def test_a_rank_that_hangs_in_the_collective_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    (found, seconds), _ = two_ranks.run(examined, str(tmp_path / "store"), "hangs in the collective")
    assert ("collective", 0, "node0") in failures(found)  # who waited
    (named,) = [one for one in found if one["check"] == "collective" and "did not enter" in one["text"]]
    assert (named["rank"], named["host"]) == (1, "node1")
    assert seconds < 12


def test_a_clock_that_is_off_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    (found, _), _ = two_ranks.run(examined, str(tmp_path / "store"), "clock")
    assert failures(found) == [("clock", 1, "node1")]
    (clock,) = [one for one in found if one["check"] == "clock"]
    assert clock["values"]["offset_seconds"] == pytest.approx(90, abs=0.5)


def test_what_another_rank_found_alone_reaches_rank_0(two_ranks: RankPool, tmp_path: Path) -> None:
    (found, _), _ = two_ranks.run(examined, str(tmp_path / "store"), "disk")
    assert failures(found) == [("disk", 1, "node1")]


def test_a_rank_with_slow_links_is_named() -> None:
    """Of six in a chain, rank 3's links are slow, and so is one link each of its neighbours, who are not named."""

    def link(rank: int, **rates: float) -> Finding:
        values = {"bytes_per_second": {name.removeprefix("r"): rate for name, rate in rates.items()}}
        return Finding("links", "OK", "", rank=rank, values=values)

    findings = [
        link(0, r1=100), link(1, r0=100, r2=95), link(2, r1=95, r3=10), link(3, r2=10, r4=12), link(4, r3=12, r5=99),
        link(5, r4=99),
    ]  # fmt: skip
    (named,) = slow_links(findings, [f"node{rank}" for rank in range(6)])
    assert (named.rank, named.host, named.status) == (3, "node3", "WARN")
    assert slow_links([one for one in findings if one.rank in (0, 1, 4, 5)], ["n"] * 6) == []


def start(rank: int, size: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--mib", "1", *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.launcher
@pytest.mark.parametrize("number", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_command_on_two_ranks(number: int, tmp_path: Path) -> None:
    """And with one of them missing: it is named, and rank 0 ends."""
    port = free_port()
    options = ["--folder", str(tmp_path), "--json", "--deadline", "60" if number == 2 else "8"]
    processes = [start(rank, 2, port, *options) for rank in range(number)]
    said = [process.communicate(timeout=200) for process in processes]
    found = json.loads(said[0][0])
    if number == 1:
        assert processes[0].returncode == 1
        assert "1 of 2 processes did not come within --deadline 8 s: ranks 1" in found["findings"][0]["text"]
        return
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[1][0] == "" and found["world_size"] == 2
    checks = [one["check"] for one in found["findings"]]
    assert checks.count("devices") == checks.count("links") == 2 and checks.count("disk") == checks.count("clock") == 1


@pytest.mark.slow
@pytest.mark.launcher
def test_a_process_that_is_stopped_is_named(tmp_path: Path) -> None:
    """By SIGSTOP, while rank 0 measures the disk: the two have come together by then."""
    port = free_port()
    processes = [
        start(rank, 2, port, "--folder", str(tmp_path), "--json", "--deadline", "6", "--mib", "256")
        for rank in range(2)
    ]
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob(".doctor.*")) and time.monotonic() < end:
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGSTOP)
        out, _ = processes[0].communicate(timeout=200)
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode == 1
    named = [one for one in json.loads(out)["findings"] if one["check"] == "ranks" and one["status"] == "FAIL"]
    assert [one["rank"] for one in named] == [1] and "within 6 s; it is at: " in named[0]["text"]
