"""The start of a run: all processes come together, or the missing ones are named."""

from __future__ import annotations

import datetime
import json
import platform
import socket
import time
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from megagamma.environment import launcher_serves_store, rendezvous_address, restart_count
from megagamma.errors import DistributedError

# Versions that must be equal on all ranks: others could compute something else, silently.
_MUST_AGREE = ("torch", "megatron-core", "deepspeed")


def _about(device: str) -> dict[str, Any]:
    """What this process reports of itself to the others."""
    return {
        "host": socket.gethostname(),
        "device": device,
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in _MUST_AGREE},
    }


def first_sentence(error: BaseException) -> str:
    """What torch says, without the C++ frames that it adds."""
    text = str(error).split("Exception raised from")[0].split("\nC++")[0].split("\nframe #")[0]
    return " ".join(text.split())[:200]


def _open_store(rank: int, size: int, seconds: float) -> dist.Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT; rank 0 serves it unless torchrun does already.

    Raises:
        ConfigurationError: MASTER_PORT is not a port.
        DistributedError: the port is in use, or the address does not answer in time.
    """
    address, port = rendezvous_address()
    try:
        store = dist.TCPStore(
            address,
            port,
            size,
            is_master=rank == 0 and not launcher_serves_store(),
            timeout=datetime.timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        text = first_sentence(error)
        if "EADDRINUSE" in text or "in use" in text:
            raise DistributedError(
                f"MASTER_PORT={port}: another program listens on {address}:{port}: choose a free port "
                "(deepspeed --master_port N, torchrun --master-port N)"
            ) from error
        raise DistributedError(
            f"rank {rank} of {size} could not reach {address}:{port} in {seconds:g} s ({text}): check that rank 0 "
            "was started and that MASTER_ADDR is reachable from this host"
        ) from error
    # A restart by torchrun finds the keys of the attempt before.
    return dist.PrefixStore(f"attempt{restart_count()}", store)


def _wait_for_all(store: dist.Store, size: int, deadline: float, minutes: float) -> None:
    missing = list(range(size))
    while missing:
        missing = [one for one in missing if not store.check([f"rank{one}"])]
        if missing and time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
            raise DistributedError(
                f"{len(missing)} of {size} processes did not come within run.start_minutes={minutes:g}: ranks {shown}: "
                "look at the launcher's output and at those hosts"
            )
        if missing:
            time.sleep(0.05)


def rendezvous(rank: int, size: int, device: torch.device, minutes: float) -> tuple[dist.Store, list[dict[str, Any]]]:
    """Wait until all processes of the run are there.

    Args:
        rank: of this process.
        size: processes of the run.
        device: of this process, reported to the others.
        minutes: deadline.

    Raises:
        DistributedError: the port is in use; ranks are missing at the deadline, and are named; or versions differ.

    Returns:
        The store that they came together at, and what each rank reported of itself.
    """
    if size == 1:
        return dist.HashStore(), [_about(str(device))]  # no port is needed to talk to oneself
    seconds = minutes * 60
    deadline = time.monotonic() + seconds
    store = _open_store(rank, size, seconds)
    try:
        store.set(f"rank{rank}", json.dumps(_about(str(device))))
        _wait_for_all(store, size, deadline, minutes)
        found = [json.loads(store.get(f"rank{one}")) for one in range(size)]
    except RuntimeError as error:  # torch's own, when the store is gone
        address, port = rendezvous_address()
        raise DistributedError(
            f"rank {rank} of {size} lost rank 0, which serves {address}:{port}: its own message says why it left"
        ) from error
    for one, about in enumerate(found):
        if about["versions"] != found[0]["versions"]:
            raise DistributedError(
                f"rank {one} on {about['host']} has {about['versions']}, rank 0 on {found[0]['host']} has "
                f"{found[0]['versions']}: install the same versions on all hosts"
            )
    return store, found
