"""Nearest: the fastest way to a worker that there is, found by trying.

The peer's address says nothing about where it is: two containers may share a host name, a network
or neither. What can be connected to and mapped is near, everything else is far.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import zmq

from cluster.credentials import Credentials
from cluster.errors import WorkerLost
from cluster.messages import Hello, Peer
from engine.staging import Room
from kvtransfer.cuda_ipc import CudaIpc, CudaIpcWire
from kvtransfer.frames import Buffer
from kvtransfer.link import ANSWER_TIMEOUT_S, FramedLink, Heap, Rooms, Wire
from kvtransfer.near import NearWire
from kvtransfer.shared_memory import SharedMemoryWire
from kvtransfer.zeromq import ZmqWire

log = logging.getLogger(__name__)


class Nearest:
    """A Wire, and its Rooms: the first of `nears` that can be opened, `far` if none can."""

    def __init__(self, nears: Sequence[NearWire], far: Wire) -> None:
        self._nears = nears
        self._far = far
        self._wire: Wire = far
        self._rooms: Rooms = Heap()

    async def open(
        self, received: Callable[[list[Buffer]], None], lost: Callable[[str], None]
    ) -> None:
        reasons = []
        for near in self._nears:
            try:
                await near.open(received, lost)
            except WorkerLost as error:
                near.close()
                reasons.append(error.message)
            else:
                self._wire, self._rooms = near, near
                return
        log.info("KV goes over ZeroMQ", extra={"reason": "; ".join(reasons)})
        await self._far.open(received, lost)

    async def room(self, size: int) -> Room:
        return await self._rooms.room(size)

    def free(self, room: Room) -> None:
        self._rooms.free(room)

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        self._wire.send(parts)

    def close(self) -> None:
        for wire in (*self._nears, self._far):
            wire.close()


def link_to(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    hello: Hello,
    peer: Peer,
    answer_timeout: float = ANSWER_TIMEOUT_S,
    ipc: CudaIpc | None = None,
    credentials: Credentials | None = None,
    transport: str = "auto",
) -> FramedLink:
    """A Link, not yet open, from the worker that `hello` describes to `peer`, whose ROUTER is at
    `address`. `ipc` is for a worker whose KV is on a GPU, `transport` is --kv-transport."""
    nears: list[NearWire] = [SharedMemoryWire(peer)]
    if ipc is not None:
        nears.insert(0, CudaIpcWire(peer, ipc))
    if transport == "zeromq":
        nears = []
    wire = Nearest(nears, ZmqWire(context, address, credentials))
    return FramedLink(wire, hello, peer, rooms=wire, answer_timeout=answer_timeout)
