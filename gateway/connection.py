"""One client's connection: uvicorn's, held to account, with a short way out for streamed tokens.

    AnswerResponse -> send -> five layers of wrappers -> h11 -> transport      head and end
                   -> Outlet -> transport                                      every token

h11 spends longer on framing one token than all else here takes together. Its framing of a chunk
depends on nothing that came before, so between head and end it need not be asked. What it decides
stays with it: whether a response is chunked at all, and what may follow it.

uvicorn waits for a request's head for ever and takes any number of connections. Here, while no
request is being answered, a connection has a deadline, and a Crowd counts all of them.

Source  RFC 9112, section 7.1 (chunked transfer coding), 2.2 (line ends).
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import h11
from h11._receivebuffer import ReceiveBuffer
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from cluster.errors import BadRequest, BatonError, Cancelled, Overloaded, RequestTimeout, TooLarge

EXTENSION: Final = "baton.stream"
"""The ASGI extension whose "outlet" is the Outlet. Without one, `send` does as well."""

HEAD_S: Final = 10.0
"""From a connection's start, or the first byte of a further request, to the end of its head."""

LINGER_S: Final = 1.0
"""How long a client that is still writing may do so after its answer: closed at once, it would get
a reset instead."""


MAX_HEAD_BYTES: Final = 32 << 10

FREE_PIECES: Final = 1024
LEAST_PIECE_BYTES: Final = 64
"""Each chunk of a body takes some 8 us of the event loop, 24,000 of them fit into one read: beyond
the first FREE_PIECES they must have a size on average."""


class HeadersTooLarge(TooLarge):
    http = 431
    code = "headers_too_large"


@dataclass(slots=True)
class Crowd:
    """The connections of one server: how many there are and may be. Owned by the event loop."""

    most: int = 8192
    most_per_peer: int = 4096
    head_s: float = HEAD_S
    tell: Callable[[str], None] = lambda code: None  # what became of a refused one
    total: int = 0
    by_peer: Counter[str] = field(default_factory=Counter)

    def admit(self, peer: str) -> bool:
        """Count one more, if there is room for it."""
        if self.total >= self.most or self.by_peer[peer] >= self.most_per_peer:
            return False
        self.total += 1
        self.by_peer[peer] += 1
        return True

    def leave(self, peer: str) -> None:
        self.total -= 1
        self.by_peer[peer] -= 1
        if not self.by_peer[peer]:
            del self.by_peer[peer]


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 on h11; puts an Outlet into the scope of each request."""

    def __init__(
        self,
        *arguments: Any,
        crowd: Crowd | None = None,
        counted_as: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self.conn = _Parser(h11.SERVER, MAX_HEAD_BYTES)
        self._crowd = crowd or Crowd()
        self._peer = counted_as  # while it is counted
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = False
        self._resumed = 0  # how often the client has caught up
        self._unread = (0, 0)
        self._looks = 0  # in a row that saw nothing read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = peer_of(self.client)
        if self._peer is not None or self._crowd.admit(peer):
            self._peer = peer
            self._deadline = self.loop.call_later(self._crowd.head_s, self._too_slow)
        else:
            self._refuse(Overloaded("Too many connections.", code="too_many_connections"))
            transport.close()  # without lingering: that would be one more after all

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_deadline()
        if self._peer is not None:
            self._crowd.leave(self._peer)
            self._peer = None

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._watch()

    def _watch(self) -> None:
        """Without an answer to wait for, what comes is the beginning of a head, or the body of a
        request that was answered without it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unset_deadline()
        elif self._deadline is None and not self._refused:
            self._deadline = self.loop.call_later(self._crowd.head_s, self._too_slow)

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        if self.cycle is not cycle and self.scope["http_version"] == "1.1":
            # The application's task exists but has not begun: it finds the scope complete.
            outlet = Outlet(self.cycle, self.transport)
            self.scope["extensions"] = {EXTENSION: {"outlet": outlet}}

    def resume_writing(self) -> None:
        super().resume_writing()
        self._resumed += 1

    def look(self, most: int) -> None:
        """Hang up when `most` looks in a row have seen bytes to be read, and the same as before."""
        unread = self._resumed, self.transport.get_write_buffer_size()
        self._looks = self._looks + 1 if unread[1] and unread == self._unread else 0
        self._unread = unread
        if self._looks >= most:
            self._crowd.tell("slow_reader")
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """For what h11 has refused, while uvicorn handles the exception that says so."""
        match getattr(sys.exception(), "error_status_hint", 400):
            case 413:
                self._refuse(TooLarge("The body comes in too many small pieces."))
            case 431:
                self._refuse(HeadersTooLarge("The request has too many or too large headers."))
            case _:
                self._refuse(BadRequest("This is not HTTP/1.1.", code="invalid_http"))

    def _too_slow(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            after = f"{self._crowd.head_s:g} s"
            self._refuse(RequestTimeout(f"The request's head was not complete after {after}."))
        else:
            self.transport.close()  # nobody waits for an answer

    def _refuse(self, error: BatonError) -> None:
        """Say so, if no other answer has begun, and hang up."""
        self._refused = True
        self._crowd.tell(error.code)
        self._unset_deadline()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its application has nobody to answer any more
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_answer(error))
            if self.transport.can_write_eof():
                self.transport.write_eof()
                self.flow.resume_reading()
                self._deadline = self.loop.call_later(LINGER_S, self.transport.close)
                return
        self.transport.close()

    def _unset_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Parser(h11.Connection):
    """h11, stricter about lines, and bounded in the work that one request's pieces make."""

    def __init__(self, role: type[h11.SERVER], max_head_bytes: int) -> None:
        super().__init__(role, max_head_bytes)
        self._receive_buffer = _StrictLines()
        self._pieces = self._bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._pieces += 1
            self._bytes += len(event.data)
            if self._pieces > FREE_PIECES and self._bytes < self._pieces * LEAST_PIECE_BYTES:
                raise h11.RemoteProtocolError("tiny pieces", error_status_hint=413)
        elif isinstance(event, h11.Request):
            self._pieces = self._bytes = 0
            if event.http_version not in (b"1.0", b"1.1"):
                raise h11.RemoteProtocolError("another version of HTTP")
        return event


async def watch_readers(connections: Collection[Connection], seconds: float) -> None:
    """Hang up on clients that have read nothing for `seconds`: who was writing to them is told that
    they are gone. Runs as long as the server."""
    looks = 4
    while True:
        await asyncio.sleep(seconds / looks)
        for connection in list(connections):
            connection.look(looks)


class _StrictLines(ReceiveBuffer):  # h11 shows no other place to look
    """Heads whose lines end with CR LF and are not continued by the next. h11 is more generous; a
    proxy that is not would see another request than we do."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        before = bytes(self)
        lines: list[bytearray] | None = super().maybe_extract_lines()
        if lines is not None:
            head = before[: len(before) - len(self)]
            if head.count(b"\n") != head.count(b"\r\n") or b"\n " in head or b"\n\t" in head:
                raise h11.RemoteProtocolError("a line ends without CR, or is continued")
        return lines


def peer_of(client: tuple[str, int] | None) -> str:
    """Whose connection it is: an IPv4 address, or the /64 that one IPv6 host can choose from."""
    host = client[0] if client else ""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return address.packed[:8].hex()


def _answer(error: BatonError) -> bytes:
    """A whole response, after which the connection ends."""
    body = json.dumps(error.body()).encode()
    head = (
        f"HTTP/1.1 {error.http} {HTTPStatus(error.http).phrase}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        "connection: close\r\n"
    )
    if error.retry:
        head += "retry-after: 1\r\n"
    return head.encode("ascii") + b"\r\n" + body


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
