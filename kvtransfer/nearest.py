"""Nearest: the fastest way to a worker that there is, found by trying.

The peer's address says nothing about where it is: two containers may share a host name, a network
or neither. What can be connected to and mapped is near, everything else is far.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import zmq

from cluster.errors import WorkerLost
from cluster.messages import Hello, Peer
from kvtransfer.frames import Buffer
from kvtransfer.link import ANSWER_TIMEOUT_S, FramedLink, Heap, Rooms, Wire
from kvtransfer.shared_memory import SharedMemoryWire
from kvtransfer.zeromq import ZmqWire

log = logging.getLogger(__name__)


class Nearest:
    """A Wire, and its Rooms, that is `near` if that can be opened and `far` otherwise."""

    def __init__(self, near: SharedMemoryWire, far: Wire) -> None:
        self._near = near
        self._far = far
        self._wire: Wire = far
        self._rooms: Rooms = Heap()

    async def open(
        self, received: Callable[[list[Buffer]], None], lost: Callable[[str], None]
    ) -> None:
        try:
            await self._near.open(received, lost)
        except WorkerLost as error:
            self._near.close()
            log.info("KV goes over ZeroMQ", extra={"reason": error.message})
            await self._far.open(received, lost)
        else:
            self._wire, self._rooms = self._near, self._near

    async def room(self, size: int) -> memoryview:
        return await self._rooms.room(size)

    def free(self, room: memoryview) -> None:
        self._rooms.free(room)

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        self._wire.send(parts)

    def close(self) -> None:
        self._near.close()
        self._far.close()


def link_to(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    hello: Hello,
    peer: Peer,
    answer_timeout: float = ANSWER_TIMEOUT_S,
) -> FramedLink:
    """A Link, not yet open, from the worker that `hello` describes to `peer`, whose ROUTER is at
    `address`."""
    wire = Nearest(SharedMemoryWire(peer), ZmqWire(context, address))
    return FramedLink(wire, hello, peer, rooms=wire, answer_timeout=answer_timeout)
