"""Which sockets a process listens on, from Linux's own tables."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

_LISTEN = "0A"


def _address(text: str, width: int) -> str:
    # Words of 32 bits, each in the byte order of the machine.
    data = b"".join(int(text[start : start + 8], 16).to_bytes(4, "little") for start in range(0, width, 8))
    return str(ipaddress.ip_address(data))


def listening() -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which this process listens."""
    own = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    found = set()
    for table, width in (("tcp", 8), ("tcp6", 32)):
        path = Path("/proc/self/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in own:
                host, port = fields[1].split(":")
                found.add((_address(host, width), int(port, 16)))
    return found
