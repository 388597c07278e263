"""One client's connection: uvicorn's, with a short way out for the parts of a streamed response.

    AnswerResponse -> send -> five layers of wrappers -> h11 -> transport      head and end
                   -> Outlet -> transport                                      every token

h11 spends longer on framing one token than all else here takes together. Its framing of a chunk
depends on nothing that came before, so between head and end it need not be asked. What it decides
stays with it: whether a response is chunked at all, and what may follow it.

Source  RFC 9112, section 7.1 (chunked transfer coding).
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from cluster.errors import Cancelled

EXTENSION: Final = "baton.stream"
"""The ASGI extension whose "outlet" is the Outlet. Without one, `send` does as well."""


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 on h11; puts an Outlet into the scope of each request."""

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        if self.cycle is not cycle and self.scope["http_version"] == "1.1":
            # The application's task exists but has not begun: it finds the scope complete.
            outlet = Outlet(self.cycle, self.transport)
            self.scope["extensions"] = {EXTENSION: {"outlet": outlet}}


class Outlet:
    """Writes parts of a response whose head is sent and is chunked: without a Content-Length."""

    def __init__(self, cycle: RequestResponseCycle, transport: asyncio.Transport) -> None:
        self._cycle = cycle
        self._transport = transport

    def write(self, data: bytes) -> None:
        """Takes it all, at once. Raises Cancelled when the client is gone."""
        if self._cycle.disconnected or self._transport.is_closing():
            raise Cancelled("The client went away.")
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    @property
    def full(self) -> bool:
        """Whether the client reads more slowly than we write."""
        return self._cycle.flow.write_paused

    async def drained(self) -> None:
        """Until the client has read on, or is gone."""
        while self.full and not self._cycle.disconnected:
            await self._cycle.flow.drain()


def outlet_of(scope: Scope) -> Outlet | None:
    """The outlet of this request's connection, if it has one."""
    extension: dict[str, Outlet] = scope.get("extensions", {}).get(EXTENSION, {})
    return extension.get("outlet")
