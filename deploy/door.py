"""Door: the listening sockets of several gateway processes that share one port."""

from __future__ import annotations

import socket
from typing import Final

from cluster.errors import StartError
from cluster.ports import listen

LOOPBACK: Final = "127.0.0.1"


class Door:
    """For each of `count` gateways a socket on the shared port and one on a port of its own.

    The kernel deals connections out among the sockets of the shared port (SO_REUSEPORT), evenly
    whatever the gateways are doing. They stay open here while a gateway is started again: what
    connects meanwhile waits in its queue instead of being refused. The own ports are on loopback,
    for whoever means one certain gateway.
    """

    def __init__(self, host: str, port: int, count: int) -> None:
        """Raises StartError if anybody else listens there, though it were to share the port."""
        check_free(host, port)
        self._shared: list[socket.socket] = []
        self._own: list[socket.socket] = []
        try:
            for _ in range(count):
                self._shared.append(listen(host, port, reuse_port=True))
                self._own.append(listen(LOOPBACK, 0))
        except StartError:
            self.close()
            raise

    @property
    def addresses(self) -> tuple[str, ...]:
        """The gateways' own, in their order."""
        return tuple("{}:{}".format(*own.getsockname()[:2]) for own in self._own)

    def sockets(self, number: int) -> tuple[int, int]:
        """What one gateway inherits: the shared port's socket and its own."""
        return self._shared[number].fileno(), self._own[number].fileno()

    def close(self) -> None:
        """Ours only: a gateway that still has them goes on."""
        for listener in (*self._shared, *self._own):
            listener.close()


def check_free(host: str, port: int, flag: str = "--port") -> None:
    """Raises StartError if somebody listens there. A gateway finds out by itself, but only after
    we may have asked another cluster whether it is ready, and our workers have joined it."""
    listen(host, port, flag).close()
