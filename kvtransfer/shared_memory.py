"""Links within one machine: bodies through memory that both processes see, the rest by messages.

    sender                                                         receiver
    memory without a name, sealed against shrinking -- its descriptor --> maps it, to read only
    KV gathered into a region of it; frame's header, region -- message --> copies the region out
    region is free again <------------------------------------ message -- answer

That the other side can map the memory is the proof that it is on this machine; both kernels' ends
say whose process that is. Where any of it fails the wire cannot be opened, and ZeroMQ takes over.

Nothing is judged before it is out of the sender's reach: digest, landing and generation are looked
at on the receiver's own copy, so a sender that dies, or that writes to a region too early, damages
a frame and never a page. Neither the memory nor the sockets have a name in a file system, so they
end with the processes that hold them, however those end.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import secrets
import socket
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from struct import Struct

import numpy as np
import numpy.typing as npt

from cluster.errors import WorkerLost
from cluster.messages import Peer
from kvtransfer.frames import MAX_BODY, Buffer
from kvtransfer.receiver import Receiver
from kvtransfer.ring import Ring
from kvtransfer.unix import Port, name_of, new_socket, owner, stopped

log = logging.getLogger(__name__)

RING_BYTES = 64 << 20
"""Of address space; only as much is ever memory as lay unanswered at one time."""
MAX_RING_BYTES = 1 << 30
MAX_GUESTS = 1024
"""Connections at one time, each worth two descriptors."""
READY_S = 0.5
"""How long the peer may take to map the memory; then ZeroMQ is tried."""
LOOK_S = 0.3
"""How often the peer's process is looked at; its death shows at once, that it is stopped does not.
"""
RETRY_S = 1.0
"""When to accept again after there was no descriptor left for it."""

KEPT = 32
"""Copies of one size whose memory is kept for the next."""

KIND = "kv"
_OFFER, _READY = b"ring", b"ready"
_PLACE = Struct("<HQQ")  # bytes of header; where the body lies, and how many bytes of it
_INLINE = 2**64 - 1
"""The place of a body that follows its header."""

Bytes = npt.NDArray[np.uint8]


def _message(parts: tuple[Buffer, Buffer], start: int = _INLINE) -> bytes:
    header, body = parts
    place = _PLACE.pack(len(header), start, len(body))
    return b"".join((place, header, body if start == _INLINE else b""))


class Copies:
    """Private copies of bodies, in memory that is used again once nobody holds the copy.

    The allocator would give large pieces back to the system and fetch them anew, page by page,
    which takes longer than the copying.
    """

    def __init__(self) -> None:
        # By size in powers of two. Appended to by whichever thread drops a copy.
        self._free: dict[int, deque[Bytes]] = {}

    def of(self, source: Bytes) -> memoryview:
        """`source` as it is now. Without holding the interpreter's lock."""
        free = self._free.setdefault(max(1, source.size - 1).bit_length(), deque(maxlen=KEPT))
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(1 << max(1, source.size - 1).bit_length(), dtype=np.uint8)
        copy = memory[: source.size]
        weakref.finalize(copy, free.append, memory).atexit = False
        np.copyto(copy, source)
        return copy.data


class SharedMemoryWire:
    """A Wire to a peer on this machine, and its Rooms. Raises WorkerLost if it is elsewhere."""

    def __init__(self, peer: Peer, ring_bytes: int = RING_BYTES) -> None:
        self._peer = peer
        self._ring = Ring(ring_bytes)
        self._freed = asyncio.Event()
        self._memory: memoryview | None = None
        self._rooms: dict[int, tuple[int, memoryview]] = {}  # by identity: start, the room itself
        self._port: Port | None = None
        self._pid = 0
        self._ready: asyncio.Future[None] | None = None
        self._received: Callable[[list[Buffer]], None] = lambda parts: None
        self._lost: Callable[[str], None] = lambda reason: None
        self._watch: asyncio.TimerHandle | None = None

    async def open(
        self, received: Callable[[list[Buffer]], None], lost: Callable[[str], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        try:
            self._offer()
            timer = loop.call_later(READY_S, self._end, "the peer is silent")
            try:
                await self._ready
            finally:
                timer.cancel()
        except OSError as error:  # a timeout is one, too
            raise WorkerLost(f"no shared memory: {error}") from error
        self._received, self._lost = received, lost
        self._watch = loop.call_later(LOOK_S, self._look)

    def _offer(self) -> None:
        """Connect, make the memory and hand its descriptor over. Raises OSError."""
        connected = new_socket()
        try:
            connected.connect(name_of(KIND, self._peer))
            self._pid = owner(connected)
            memory = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(memory, self._ring.total)
                # Shrunk under its reader, memory kills it (SIGBUS): no reader maps it unsealed.
                seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
                fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
                self._memory = memoryview(mmap.mmap(memory, self._ring.total))
                socket.send_fds(connected, [_OFFER], [memory])
            finally:
                os.close(memory)
        except BaseException:
            connected.close()
            raise
        self._port = Port(connected, self._take, self._end)

    async def room(self, size: int) -> memoryview:
        assert size <= self._ring.total, f"{size} bytes asked of {self._ring.total}"
        while self._memory is not None:
            if (start := self._ring.take(size)) is not None:
                room = self._memory[start : start + size]
                self._rooms[id(room)] = start, room
                return room
            self._freed.clear()
            await self._freed.wait()
        raise WorkerLost("closed")

    def free(self, room: memoryview) -> None:
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
        if self._port is not None:
            self._port.close()
        if self._watch is not None:
            self._watch.cancel()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(ConnectionError("closed"))
        self._port = self._memory = None
        self._rooms.clear()
        self._freed.set()  # who waits for room is told

    def _take(self, message: bytes) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
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
        if stopped(self._pid):
            self._lost("connection lost: the process is stopped")
        else:
            self._watch = asyncio.get_running_loop().call_later(LOOK_S, self._look)


@dataclass(frozen=True, slots=True)
class _Guest:
    """A sender on this machine."""

    port: Port
    memory: Bytes  # its own, ours to read


class SharedMemoryHost:
    """Where senders of this machine connect: feeds a Receiver, beside the transport it has."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._elsewhere = receiver.send
        self._listener: socket.socket | None = None
        self._strangers: set[socket.socket] = set()  # have offered nothing yet
        self._guests: dict[bytes, _Guest] = {}
        self._copies = Copies()

    def __len__(self) -> int:
        return len(self._guests) + len(self._strangers)

    def start(self, peer: Peer) -> None:
        """Listen as this start of this worker. Where that cannot be, senders use ZeroMQ."""
        try:
            listener = new_socket()
            try:
                listener.bind(name_of(KIND, peer))
                listener.listen()
            except OSError:
                listener.close()
                raise
        except OSError as error:
            log.warning("no KV through shared memory: %s", error)
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
            log.warning("sender refused: %s", error)
            connected.close()
            return
        if len(self) >= MAX_GUESTS:
            connected.close()
            return
        self._strangers.add(connected)
        loop.add_reader(connected.fileno(), self._meet, connected)

    def _meet(self, connected: socket.socket) -> None:
        """Map what a stranger offers, who is a guest then."""
        asyncio.get_running_loop().remove_reader(connected.fileno())
        self._strangers.discard(connected)
        try:
            memory = _mapped(connected)
        except (OSError, ValueError) as error:
            log.warning("sender refused: %s", error)
            connected.close()
            return
        # Not to be guessed: routes that ZeroMQ's peers choose themselves are in the same table.
        route = secrets.token_bytes(16)
        port = Port(connected, partial(self._take, route), partial(self._leave, route))
        self._guests[route] = _Guest(port, memory)
        port.send(_READY)

    def _take(self, route: bytes, message: bytes) -> None:
        guest = self._guests[route]
        parts: list[Buffer] = []  # no frame at all, for what cannot be read
        if len(message) >= _PLACE.size:
            length, start, size = _PLACE.unpack_from(message)
            header, rest = message[_PLACE.size :][:length], message[_PLACE.size + length :]
            if start == _INLINE:
                parts = [header, rest]
            elif size <= MAX_BODY and start + size <= len(guest.memory) and not rest:
                parts = [header, self._copies.of(guest.memory[start : start + size])]
        self._receiver.take(route, parts)

    def _leave(self, route: bytes, reason: str) -> None:
        self._guests.pop(route, None)

    def _send(self, route: bytes, parts: tuple[Buffer, Buffer]) -> None:
        if guest := self._guests.get(route):
            guest.port.send(_message(parts))
        else:
            self._elsewhere(route, parts)


def _mapped(connected: socket.socket) -> Bytes:
    """The memory that a stranger offers. Raises OSError, and ValueError for what we do not map."""
    message, descriptors, _, _ = socket.recv_fds(
        connected, len(_OFFER) + 1, 2, socket.MSG_CMSG_CLOEXEC
    )
    try:
        if message != _OFFER or len(descriptors) != 1:
            raise ValueError("no memory was offered")
        seals = fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS)
        size = os.fstat(descriptors[0]).st_size
        if not seals & fcntl.F_SEAL_SHRINK or not 0 < size <= MAX_RING_BYTES:
            raise ValueError(f"{size} bytes with seals {seals:#x} are not mapped")
        return np.frombuffer(mmap.mmap(descriptors[0], size, prot=mmap.PROT_READ), np.uint8)
    finally:
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)
