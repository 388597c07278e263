"""The TCP sockets of a process, from /proc."""

from __future__ import annotations

import ipaddress
import os
import struct
from dataclasses import dataclass
from pathlib import Path

ESTABLISHED, LISTENS = 1, 10


@dataclass(frozen=True)
class Socket:
    """One line of /proc/net/tcp or tcp6."""

    local: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    remote_port: int
    state: int


def sockets(pid: int) -> list[Socket]:
    """Its TCP sockets, whatever their state."""
    own = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(entry))
        except FileNotFoundError:
            continue  # closed since
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, state, *_ = line.split()
            if f"socket:[{line.split()[9]}]" in own:
                place, port = local.split(":")
                remote_port = int(remote.split(":")[1], 16)
                found.append(Socket(address(place), int(port, 16), remote_port, int(state, 16)))
    return found


def address(hexadecimal: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """As the kernel prints it: words in this machine's order."""
    words = [int(hexadecimal[i : i + 8], 16) for i in range(0, len(hexadecimal), 8)]
    found = ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words))
    return getattr(found, "ipv4_mapped", None) or found
