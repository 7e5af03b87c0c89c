"""Who can reach the processes of a run, and with what: addresses that are listened on, and what ranks exchange."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import RankPool, free_port
from support.sockets import listening

from megagamma.distributed import rendezvous
from megagamma.distributed.exchange import describe_error, pack, restore_error, unpack
from megagamma.environment import World, keep_gloo_on_this_host
from megagamma.errors import CheckpointError, DataError, DistributedError, MegagammaError, TrainingError


def sockets_of_a_rank() -> tuple[set[tuple[str, int]], set[tuple[str, int]], int]:
    """What a rank of a run listens on; what torch's own store adds to it; the rendezvous port."""
    import os

    import torch.distributed as dist

    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment

    world = world_from_environment()
    runtime = Runtime(parse_config(["--config", "configs/smoke.yaml"], world_size=world.size), world)
    runtime.barrier()
    ours = listening()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stock = listening() - ours
    del store
    runtime.close_groups()
    return ours, stock, int(os.environ["MASTER_PORT"])


def test_ranks_of_one_host_listen_on_its_loopback_alone(two_ranks: RankPool) -> None:
    ranks = two_ranks.run(sockets_of_a_rank)
    for rank, (ours, stock, port) in enumerate(ranks):
        assert {address for address, _ in ours} == {"127.0.0.1"}
        assert (("127.0.0.1", port) in ours) == (rank == 0)
        assert len(ours) > (rank == 0), "gloo's sockets are among them"
        # A store of torch's own, which this test must notice.
        assert {address for address, _ in stock} <= {"::", "0.0.0.0"} and stock


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_the_store_listens_on_the_address_asked_for(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", str(port))
    if address == "::1":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 here")
    for is_one_host in (True, False):
        served = rendezvous._open_store(0, 2, 10, is_one_host)
        client = rendezvous._open_store(1, 2, 10, is_one_host)
        served.set("key", "value")
        assert client.get("key") == b"value"
        addresses = {found for found, number in listening() if number == port}
        assert len(addresses) == 1 and addresses <= {"127.0.0.1", "::1"}
        assert address not in ("127.0.0.1", "::1") or addresses == {address}
        del served, client


def test_ranks_of_one_host_meet_on_loopback_whatever_the_address() -> None:
    assert rendezvous.store_address("192.0.2.7", True) == "127.0.0.1"
    assert rendezvous.store_address("node1.invalid", True) == "127.0.0.1"
    assert rendezvous.store_address("192.0.2.7", False) == "192.0.2.7"


def test_an_address_of_another_host_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # As behind a forwarded port: every interface, as torch has it, and a warning.
    assert rendezvous._listen("192.0.2.7", free_port()) is None
    # A name that is 127.0.1.1 in /etc/hosts is of no use to the other hosts.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.1.1", 0))])
    assert rendezvous._listen("node1", free_port()) is None
    monkeypatch.undo()
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with contextlib.suppress(DistributedError):  # nobody answers there
        rendezvous._open_store(0, 2, 0.01, False)
    assert "listens on every interface" in caplog.text and "192.0.2.7" in caplog.text


def test_who_is_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert World(0, 4, 0, 4).is_one_host
    assert not World(0, 4, 0, 2).is_one_host
    assert not World(0, 4, 0, 0).is_one_host, "the launcher does not say"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert not World(0, 4, 0, 4).is_one_host


def test_an_interface_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    keep_gloo_on_this_host()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


# -- what ranks exchange -----------------------------------------------------------------------------------------------


def train_without_pickles(arguments: list[str]) -> tuple[int, list[str]]:
    """A whole run in which no pickle can be read or sent; the exit code, and what is forbidden all the same."""
    import pickle

    import torch.distributed as dist
    from support.train import run_trainer
    from torch.distributed import distributed_c10d

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    objects = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")
    patched: list[tuple[Any, str]] = [(pickle, "loads"), (pickle, "load"), (distributed_c10d, "_tensor_to_object")]
    patched += [(module, name) for module in (dist, distributed_c10d) for name in objects]
    before = [getattr(owner, name) for owner, name in patched]
    for owner, name in patched:
        setattr(owner, name, forbidden)
    try:
        code = run_trainer(arguments)
        caught = []
        calls: list[Callable[[], Any]] = [
            lambda: dist.all_gather_object([None], 1),
            lambda: dist.broadcast_object_list([1], src=0),
            lambda: pickle.loads(b""),
        ]
        for call in calls:
            try:
                call()
            except AssertionError as error:
                caught.append(str(error))
        return code, caught
    finally:
        for (owner, name), value in zip(patched, before, strict=True):
            setattr(owner, name, value)


@pytest.mark.parametrize("layout", [(), pytest.param(("--parallel.tensor", "2"), marks=pytest.mark.slow)])
def test_training_exchanges_no_pickle(
    two_ranks: RankPool, data_cache: str, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    common = ["--run.folder", str(tmp_path / "run"), "--data.cache", data_cache, "--validation.interval", "2", *layout]
    common += ["--checkpoint.interval", "2"]
    for steps in ("2", "4"):  # the second resumes
        for code, caught in two_ranks.run(train_without_pickles, [*common, "--run.steps", steps]):
            assert code == 0
            assert caught == ["a pickle"] * 3, "the test must notice one"
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert '"resume"' in events


def talk() -> list[Any]:
    """What a rank gets of values and exceptions of its own and of the other."""
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.environment import world_from_environment

    world = world_from_environment()
    runtime = Runtime(parse_config(["--config", "configs/smoke.yaml"], world_size=world.size), world)
    heard: list[Any] = [
        runtime.gather(
            {"rank": runtime.rank, "text": "ä" * runtime.rank, "value": 0.1 + runtime.rank, "pair": (1, None)}
        ),
        runtime.run_on_rank0(lambda: (runtime.rank, ["x"])),
    ]

    def fail(error: Exception) -> Any:
        raise error

    for action in (
        lambda: runtime.run_on_rank0(lambda: fail(CheckpointError("no checkpoint"))),
        lambda: runtime.run_on_rank0(lambda: fail(KeyError("step"))),
        lambda: runtime.run_on_rank0(lambda: Path("a")),  # no JSON
        lambda: runtime.run_on_all_ranks(lambda: fail(OSError("gone")) if runtime.rank else None),
    ):
        try:
            heard.append(action())
        except Exception as error:  # noqa: BLE001
            heard.append((type(error).__name__, str(error)))
    runtime.close_groups()
    return heard


def test_values_and_exceptions_of_ranks(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(talk)
    values = [{"rank": rank, "text": "ä" * rank, "value": 0.1 + rank, "pair": [1, None]} for rank in (0, 1)]
    assert first[:2] == second[:2] == [values, [0, ["x"]]]
    assert first[2] == second[2] == ("CheckpointError", "no checkpoint")
    assert first[3] == ("KeyError", "'step'"), "the rank that has it keeps its own"
    assert second[3] == ("DistributedError", "KeyError: 'step'")
    assert (first[4][0], second[4][0]) == ("TypeError", "DistributedError")
    assert first[5][0] == "DistributedError" and first[5][1].endswith(": OSError: gone")
    assert second[5] == ("OSError", "gone")


def test_exceptions_travel_by_their_class_of_ours() -> None:
    class OfAnotherModule(DataError):
        pass

    alone = TrainingError("x")
    alone.on_one_rank = True
    for error, kind in ((alone, TrainingError), (OfAnotherModule("x"), DataError), (ValueError("x"), DistributedError)):
        arrived = restore_error(describe_error(error))
        assert type(arrived) is kind and arrived.on_one_rank == getattr(error, "on_one_rank", False)
    # Whoever sends another name gets no other class.
    for name in ("__builtins__", "__name__", "system"):
        assert type(restore_error({"kind": name, "message": "x", "on_one_rank": False})) is DistributedError
    assert issubclass(DistributedError, MegagammaError)


def test_only_json_travels() -> None:
    value = {"a": [0.1, -0.0, 1e300, 2**70, True, None, "ä\n"]}
    assert unpack(pack(value)) == value
    for wrong in (object(), {1: 2}, [{"a": {None: 1}}], b"x", Path("a")):
        with pytest.raises(TypeError):
            pack(wrong)
