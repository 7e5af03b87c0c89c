"""The start of a run: all processes come together, or the missing ones are named."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import json
import logging
import platform
import socket
import time
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from megagamma.environment import launcher_serves_store, rendezvous_address, restart_count
from megagamma.errors import DistributedError

logger = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that may wait, as torch's own listener has it

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


def _resolve(address: str) -> list[str]:
    """Numeric addresses of a host's name, as this host resolves it; empty when it cannot."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def store_address(address: str, is_one_host: bool) -> str:
    """The address to meet at: the loopback where all ranks are on this host, whatever MASTER_ADDR's name resolves to."""
    if not is_one_host:
        return address
    return next((found for found in _resolve(address) if _is_loopback(found)), "127.0.0.1")


def _listen(address: str, port: int) -> socket.socket | None:
    """A socket that listens on `address` alone.

    torch's own store listens on every interface, whatever the address.

    Returns:
        None where that address is of no use to the other hosts, or is none of this host.

    Raises:
        OSError: the port is in use.
    """
    numeric = _resolve(address)
    if address not in (*numeric, "localhost", "ip6-localhost"):
        # Many hosts have their own name in /etc/hosts as 127.0.1.1, where others cannot reach them.
        numeric = [found for found in numeric if not _is_loopback(found)]
    for found in numeric:
        family = socket.AF_INET6 if ":" in found else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((found, port))
            listener.listen(_BACKLOG)
            return listener
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                raise
    return None


def _port_in_use(address: str, port: int) -> DistributedError:
    return DistributedError(
        f"MASTER_PORT={port}: another program listens on {address}:{port}: choose a free port "
        "(deepspeed --master_port N, torchrun --master-port N)"
    )


def first_sentence(error: BaseException) -> str:
    """What torch says, without the C++ frames that it adds."""
    text = str(error).split("Exception raised from")[0].split("\nC++")[0].split("\nframe #")[0]
    return " ".join(text.split())[:200]


def _open_store(rank: int, size: int, seconds: float, is_one_host: bool) -> dist.Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT; rank 0 serves it unless torchrun does already.

    Raises:
        ConfigurationError: MASTER_PORT is not a port.
        DistributedError: the port is in use, or the address does not answer in time.
    """
    address, port = rendezvous_address()
    listener: socket.socket | None = None
    if not launcher_serves_store():
        address = store_address(address, is_one_host)
        if rank == 0:
            try:
                listener = _listen(address, port)
            except OSError as error:
                raise _port_in_use(address, port) from error
            if listener is None:
                logger.warning(
                    "MASTER_ADDR=%s is no address of this host that others can reach, so that the rendezvous listens on "
                    "every interface, for whoever reaches port %d: set MASTER_ADDR to the address of rank 0's host in the "
                    "ranks' own network",
                    address,
                    port,
                )
    try:
        store = dist.TCPStore(
            address,
            port,
            size,
            is_master=rank == 0 and not launcher_serves_store(),
            timeout=datetime.timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except RuntimeError as error:
        text = first_sentence(error)
        if "EADDRINUSE" in text or "in use" in text:
            raise _port_in_use(address, port) from error
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


def rendezvous(
    rank: int, size: int, device: torch.device, minutes: float, is_one_host: bool = False
) -> tuple[dist.Store, list[dict[str, Any]]]:
    """Wait until all processes of the run are there.

    Args:
        rank: of this process.
        size: processes of the run.
        device: of this process, reported to the others.
        minutes: deadline.
        is_one_host: whether all processes are on this host, so that they meet on its loopback interface.

    Raises:
        DistributedError: the port is in use; ranks are missing at the deadline, and are named; or versions differ.

    Returns:
        The store that they came together at, and what each rank reported of itself.
    """
    if size == 1:
        return dist.HashStore(), [_about(str(device))]  # no port is needed to talk to oneself
    seconds = minutes * 60
    deadline = time.monotonic() + seconds
    store = _open_store(rank, size, seconds, is_one_host)
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
