"""The start of a run: missing ranks and other versions are named."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.ranks import RankPool, free_port

from megagamma.distributed import rendezvous
from megagamma.errors import DistributedError

CPU = torch.device("cpu")


def meet_in_threads(monkeypatch: pytest.MonkeyPatch, ranks: list[int], size: int, minutes: float) -> dict[int, Any]:
    """What `meet` gives or raises to each of some ranks, each in a thread of this process."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    found: dict[int, Any] = {}

    def one(rank: int) -> None:
        try:
            found[rank] = rendezvous.rendezvous(rank, size, CPU, minutes)
        except DistributedError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_ranks_hear_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    found = meet_in_threads(monkeypatch, [0, 1, 2], 3, 1)
    for rank in range(3):
        _, others = found[rank]
        assert len(others) == 3
        assert others[rank]["device"] == "cpu"
        assert others[0]["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_missing_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = meet_in_threads(monkeypatch, [0, 2], 4, 0.03)
    named = "2 of 4 processes did not come within run.start_minutes=0.03: ranks 1, 3"
    assert named in found[0]
    # Rank 0 may leave a moment before, and takes the store with it.
    assert named in found[2] or "lost rank 0" in found[2]


def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    about = rendezvous._about
    turn = iter([{"torch": "1.0"}, {"torch": "2.0"}])
    monkeypatch.setattr(rendezvous, "_about", lambda device: {**about(device), "versions": next(turn)})
    found = meet_in_threads(monkeypatch, [0, 1], 2, 1)
    assert "install the same versions" in found[0]
    assert "install the same versions" in found[1] or "lost rank 0" in found[1]


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(DistributedError, match=r"another program listens on 127\.0\.0\.1.*--master_port"):
            rendezvous.rendezvous(0, 2, CPU, 0.05)


def test_one_process_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "not a port")
    _, others = rendezvous.rendezvous(0, 1, CPU, 1)
    assert len(others) == 1


def fails_on(rank: int) -> str:
    """What every rank hears when one of them cannot read its data."""
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment
    from megagamma.errors import DataError

    world = world_from_environment()
    runtime = Runtime(parse_config(["--config", "configs/smoke.yaml"], world_size=world.size), world)

    def read() -> int:
        if runtime.rank == rank:
            raise DataError("data.paths: x is missing")
        return 7

    try:
        return str(runtime.run_on_all_ranks(read))
    except DataError as error:
        return str(error)
    finally:
        runtime.close_groups()


def test_an_error_of_one_rank_is_told_by_all(two_ranks: RankPool) -> None:
    assert two_ranks.run(fails_on, -1) == ["7", "7"]
    assert two_ranks.run(fails_on, 0) == ["data.paths: x is missing"] * 2
    for message in two_ranks.run(fails_on, 1):
        assert message.startswith("rank 1 on ")
        assert message.endswith("data.paths: x is missing")
