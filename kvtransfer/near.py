"""Near: links within one machine, whatever memory the bodies go through.

    sender                                                       receiver
    connects, and the two agree on a piece of memory <---------> both can reach
    KV gathered into a region of it; frame's header, region --> copies the region out, then judges
    region is free again <------------------------- answer ----

The socket is the proof that both are on one machine and of one user; the kernel says so. Where any
of it fails the wire cannot be opened, and something else takes over.

Nothing is judged before it is out of the sender's reach: digest, landing and generation are looked
at on the receiver's own copy, so a sender that dies, or that writes to a region too early, damages
a frame and never a page.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from struct import Struct
from typing import ClassVar, Generic, TypeVar

from cluster.errors import WorkerLost
from cluster.messages import Peer
from engine.staging import NOW, PAUSE_S, TURNS, Mark, Room
from kvtransfer.frames import MAX_BODY, Buffer
from kvtransfer.receiver import Receiver
from kvtransfer.ring import Ring
from kvtransfer.unix import Port, name_of, new_socket, owner, stopped

log = logging.getLogger(__name__)

Memory = TypeVar("Memory")

READY_S = 1.0
"""How long the peer may take to agree on the memory."""
MAX_GUESTS = 1024
"""Connections at one time, each worth two descriptors."""
LOOK_S = 0.25
LOOKS = 4
"""How often the peer's process is looked at, whose death shows at once but not that it is stopped;
and after how many looks that found it stopped (0.75 to 1 s) the link is lost."""
RETRY_S = 1.0
"""When to accept again after there was no descriptor left for it."""

_PLACE = Struct("<HQQ")  # bytes of header; where the body lies, and how many bytes of it
_INLINE = 2**64 - 1
"""The place of a body that follows its header."""


def _message(parts: tuple[Buffer, Buffer], start: int = _INLINE) -> bytes:
    header, body = parts
    place = _PLACE.pack(len(header), start, len(body))
    return b"".join((place, bytes(header), bytes(body) if start == _INLINE else b""))


class NearWire(ABC):
    """A Wire to a peer on this machine, and its Rooms. Raises WorkerLost if it is elsewhere."""

    kind: ClassVar[str]
    """Of the sockets: both sides' memory is of one kind."""
    what: ClassVar[str]
    """The memory, in words."""

    def __init__(self, peer: Peer, ring_bytes: int) -> None:
        self._peer = peer
        self._ring = Ring(ring_bytes)
        self._freed = asyncio.Event()
        self._rooms: dict[int, tuple[int, Room]] = {}  # by identity: start, the room itself
        self._port: Port | None = None
        self._pid = 0
        self._closed = False
        self._ready: asyncio.Future[None] | None = None
        self._received: Callable[[list[Buffer]], None] = lambda parts: None
        self._lost: Callable[[str], None] = lambda reason: None
        self._watch: asyncio.TimerHandle | None = None
        self._stopped = 0  # looks in a row that found it so

    async def open(
        self, received: Callable[[list[Buffer]], None], lost: Callable[[str], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._connect()
            self._ready = loop.create_future()  # not before: it would fail without anybody waiting
            timer = loop.call_later(READY_S, self._end, "the peer is silent")
            try:
                await self._ready
            finally:
                timer.cancel()
        except OSError as error:  # a timeout is one, too
            raise WorkerLost(f"no {self.what}: {error}") from error
        self._received, self._lost = received, lost
        self._watch = loop.call_later(LOOK_S, self._look)

    def _connect(self) -> None:
        """Raises OSError."""
        connected = new_socket()
        try:
            connected.connect(name_of(self.kind, self._peer))
            self._pid = owner(connected)
            self._offer(connected)
        except BaseException:
            connected.close()
            raise
        self._port = Port(connected, self._take, self._end)

    @abstractmethod
    def _offer(self, connected: socket.socket) -> None:
        """Send the first message. Raises OSError."""

    @abstractmethod
    def _agree(self, answer: bytes) -> None:
        """The peer's first message. Raises OSError."""

    @abstractmethod
    def _part(self, start: int, size: int) -> Room:
        """A part of the memory."""

    @abstractmethod
    def _let_go(self) -> None:
        """Of the memory. Once, and also of what was never agreed on."""

    async def room(self, size: int) -> Room:
        assert size <= self._ring.total, f"{size} bytes asked of {self._ring.total}"
        while self._port is not None:
            if (start := self._ring.take(size)) is not None:
                room = self._part(start, size)
                self._rooms[id(room)] = start, room
                return room
            self._freed.clear()
            await self._freed.wait()
        raise WorkerLost("closed")

    def free(self, room: Room) -> None:
        if held := self._rooms.pop(id(room), None):
            self._ring.free(held[0])
            self._freed.set()

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        if self._port is None:
            raise WorkerLost("closed")
        held = self._rooms.get(id(parts[1]))
        self._port.send(_message(parts) if held is None else _message(parts, held[0]))

    def close(self) -> None:
        """Whoever still fills a room writes to memory that nobody else sees any more."""
        if not self._closed:
            self._closed = True
            self._let_go()
        if self._port is not None:
            self._port.close()
        if self._watch is not None:
            self._watch.cancel()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(ConnectionError("closed"))
        self._port = None
        self._rooms.clear()
        self._freed.set()  # who waits for room is told

    def _take(self, message: bytes) -> None:
        if self._ready is not None and not self._ready.done():
            try:
                self._agree(message)
            except OSError as error:
                self._ready.set_exception(error)
            else:
                self._ready.set_result(None)
            return
        if len(message) < _PLACE.size:
            self._received([])  # no frame at all, and not what a sound peer sends
            return
        length, _, _ = _PLACE.unpack_from(message)
        body = _PLACE.size + length
        self._received([message[_PLACE.size : body], message[body:]])

    def _end(self, reason: str) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(ConnectionError(reason))
        else:
            self._lost(reason)

    def _look(self) -> None:
        self._stopped = self._stopped + 1 if stopped(self._pid) else 0
        if self._stopped == LOOKS:
            self._lost("connection lost: the process is stopped")
        else:
            self._watch = asyncio.get_running_loop().call_later(LOOK_S, self._look)


@dataclass(frozen=True, slots=True)
class _Guest(Generic[Memory]):
    """A sender on this machine."""

    port: Port
    memory: Memory  # that both can reach
    # Messages in order, the first of which has a body whose copy is under way.
    waiting: deque[tuple[list[Buffer], Mark]] = field(default_factory=deque)


class NearHost(ABC, Generic[Memory]):
    """Where senders of this machine connect: feeds a Receiver, beside the transport it has."""

    kind: ClassVar[str]
    """Of the sockets: both sides' memory is of one kind."""
    what: ClassVar[str]
    """The memory, in words."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._elsewhere = receiver.send
        self._listener: socket.socket | None = None
        self._strangers: set[socket.socket] = set()  # have offered nothing yet
        self._guests: dict[bytes, _Guest[Memory]] = {}

    def __len__(self) -> int:
        return len(self._guests) + len(self._strangers)

    @abstractmethod
    def _welcome(self, connected: socket.socket) -> tuple[Memory, bytes]:
        """What a stranger says first; memory for the two, and what to answer.

        Raises OSError and ValueError for a stranger that we have nothing to do with.
        """

    @abstractmethod
    def _copy(self, memory: Memory, start: int, size: int) -> tuple[Buffer, Mark] | None:
        """These bytes as they are now, once the mark has passed. None if they are not all there.

        Raises OSError and RuntimeError.
        """

    @abstractmethod
    def _let_go(self, memory: Memory) -> None:
        """Its sender has left. No copy from it is under way."""

    def start(self, peer: Peer) -> None:
        """Listen as this start of this worker. Where that cannot be, senders go another way."""
        try:
            listener = new_socket()
            try:
                listener.bind(name_of(self.kind, peer))
                listener.listen()
            except OSError:
                listener.close()
                raise
        except OSError as error:
            log.warning("no KV through %s: %s", self.what, error)
            return
        self._listener = listener
        self._elsewhere, self._receiver.send = self._receiver.send, self._send
        self._await_guests()

    def close(self) -> None:
        if self._listener is None:
            return
        loop = asyncio.get_running_loop()
        for waiting in (self._listener, *self._strangers):
            loop.remove_reader(waiting.fileno())
            waiting.close()
        for guest in self._guests.values():
            guest.port.close()
        self._listener = None
        self._strangers.clear()
        self._guests.clear()
        self._receiver.send = self._elsewhere

    def _await_guests(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        try:
            connected, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("cannot accept a sender: %s", error)
            loop.remove_reader(self._listener.fileno())
            loop.call_later(RETRY_S, self._await_guests)
            return
        connected.setblocking(False)
        try:
            owner(connected)
        except PermissionError as error:
            if not self._receiver.counters["other_user"]:  # a stranger may come back at any rate
                log.warning("sender refused: %s; later ones are only counted", error)
            self._receiver.counters["other_user"] += 1
            connected.close()
            return
        if len(self) >= MAX_GUESTS:
            connected.close()
            return
        self._strangers.add(connected)
        loop.add_reader(connected.fileno(), self._meet, connected)

    def _meet(self, connected: socket.socket) -> None:
        """Agree on memory with a stranger, who is a guest then."""
        asyncio.get_running_loop().remove_reader(connected.fileno())
        self._strangers.discard(connected)
        try:
            memory, answer = self._welcome(connected)
        except (OSError, ValueError) as error:
            log.warning("sender refused: %s", error)
            connected.close()
            return
        # Not to be guessed: routes that ZeroMQ's peers choose themselves are in the same table.
        route = secrets.token_bytes(16)
        port = Port(connected, partial(self._take, route), partial(self._leave, route))
        self._guests[route] = _Guest(port, memory)
        port.send(answer)

    def _take(self, route: bytes, message: bytes) -> None:
        guest = self._guests[route]
        parts: list[Buffer] = []  # no frame at all, for what cannot be read
        mark: Mark = NOW
        if len(message) >= _PLACE.size:
            length, start, size = _PLACE.unpack_from(message)
            header, rest = message[_PLACE.size :][:length], message[_PLACE.size + length :]
            if start == _INLINE:
                parts = [header, rest]
            elif size <= MAX_BODY and not rest:
                try:
                    copy = self._copy(guest.memory, start, size)
                except (OSError, RuntimeError) as error:
                    self._end(route, f"cannot copy: {error}")
                    return
                if copy is not None:
                    parts, mark = [header, copy[0]], copy[1]
        guest.waiting.append((parts, mark))
        if len(guest.waiting) == 1:
            self._pass_on(route)

    def _pass_on(self, route: bytes, turn: int = 0) -> None:
        """Messages in their order, up to one whose body is still being copied; those later."""
        guest = self._guests.get(route)
        if guest is None:
            return
        try:
            while guest.waiting and guest.waiting[0][1].done():
                turn = 0
                parts, _ = guest.waiting.popleft()
                self._receiver.take(route, parts)
        except (OSError, RuntimeError) as error:
            self._end(route, f"cannot copy: {error}")
            return
        if guest.waiting:
            pause = 0.0 if turn < TURNS else PAUSE_S
            asyncio.get_running_loop().call_later(pause, self._pass_on, route, turn + 1)

    def _end(self, route: bytes, reason: str) -> None:
        log.warning("sender shown out: %s", reason)
        self._guests[route].port.close()
        self._leave(route, reason)

    def _leave(self, route: bytes, reason: str) -> None:
        guest = self._guests.pop(route, None)
        if guest is not None:
            for _, mark in guest.waiting:
                mark.wait()
            self._let_go(guest.memory)

    def _send(self, route: bytes, parts: tuple[Buffer, Buffer]) -> None:
        if guest := self._guests.get(route):
            guest.port.send(_message(parts))
        else:
            self._elsewhere(route, parts)
