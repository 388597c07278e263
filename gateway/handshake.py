"""TLS for the HTTP port, held to account from the first byte on.

    accepted -> counted -> handshake, within the deadline of a head -> Connection

Where asyncio's server does the handshake, nobody hears of a connection before it is over: a client
that never begins would be in no count, and stay for a minute.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from typing import Any

from gateway.connection import Connection, Crowd, peer_of

_running: set[asyncio.Task[None]] = set()
"""The event loop itself keeps no task alive."""


class Handshake(asyncio.Protocol):
    """One accepted connection until its handshake is done; `more` is what uvicorn gives a
    Connection."""

    def __init__(self, *, context: ssl.SSLContext, crowd: Crowd, **more: Any) -> None:
        self._context = context
        self._crowd = crowd
        self._more = more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        peer = peer_of(transport.get_extra_info("peername"))
        with suppress(OSError):  # no descriptor is left: then there is no connection either
            # What uvloop hands to start_tls it has begun to read from already.
            own = transport.get_extra_info("socket").dup()
            if self._crowd.admit(peer):
                task = asyncio.create_task(self._shake_hands(own, peer))
                _running.add(task)
                task.add_done_callback(_running.discard)
            else:
                own.close()
                self._crowd.tell("too_many_connections")
        transport.abort()

    async def _shake_hands(self, own: socket.socket, peer: str) -> None:
        connection = Connection(crowd=self._crowd, counted_as=peer, **self._more)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                own,
                ssl=self._context,
                ssl_handshake_timeout=self._crowd.head_s,
            )
        except OSError:  # a TimeoutError is one, and what ssl raises
            self._crowd.leave(peer)
            self._crowd.tell("tls_handshake")
