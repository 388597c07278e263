"""Ports: listening sockets and addresses, over IPv4 and IPv6."""

from __future__ import annotations

import socket
from typing import Final

from cluster.errors import StartError

BACKLOG: Final = 2048


def listen(host: str, port: int, flag: str = "--port", reuse_port: bool = False) -> socket.socket:
    """Raises StartError that names the flag to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=BACKLOG, reuse_port=reuse_port
        )
    except OSError as error:
        reason, _, _ = (error.strerror or str(error)).partition(" (")  # which address, once more
        raise StartError(
            f"cannot listen on {address(host, port)} ({reason}): choose another {flag}"
        ) from None


def address(host: str, port: int) -> str:
    """As URLs and gRPC write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
