"""A transport in memory, and a decode worker's receiving half in one thread."""

from __future__ import annotations

import asyncio
import ctypes
import os
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from cluster.errors import WorkerLost
from cluster.messages import Fingerprint, Hello, KVLayout, LayerGroup, Peer, Request
from engine.blocks import Block, BlockPool
from engine.cache import KVCache
from engine.staging import Room
from kvtransfer.cuda_ipc import CudaIpc, Digests, _Place
from kvtransfer.frames import Ack, Buffer, Fields, Manifest, Sealed
from kvtransfer.landing import Landings
from kvtransfer.link import Fill, FramedLink
from kvtransfer.receiver import Arrived, Receiver
from tests.engine.fake_device import FakeDevice

LAYOUT = KVLayout((LayerGroup(2, 2, 4), LayerGroup(1, 3, 2, window=8)), "float32")
# A decode worker's incarnation names sockets of the whole machine: each process of a parallel test
# run has one of its own, which the processes that it starts inherit.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", "") + os.environ.get("PYTEST_XDIST_WORKER", "")
PREFILL_PEER, DECODE_PEER = Peer("p", 11), Peer("d", 22 + zlib.crc32(RUN.encode()))

Parts = list[Buffer]
Alter = Callable[[Parts], Parts | None]


def hello(peer: Peer = DECODE_PEER, layout: KVLayout = LAYOUT) -> Hello:
    return Hello(peer, "decode", "tiny", Fingerprint("config", "weights"), layout)


def prefill_hello(**changes: object) -> Hello:
    return replace(hello(PREFILL_PEER), role="prefill", **changes)  # type: ignore[arg-type]


class Shown:
    """What the kernel would say of process 99 of some user's, in place of unix._CREDENTIALS."""

    size = 12

    def __init__(self, user: int) -> None:
        self.unpack = lambda found: (99, user, user)


class MemoryHost:
    """The receiving end of MemoryWires. `alter` sees every message to the Receiver and may change
    it, or lose it by returning None."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.alter: Alter = lambda parts: parts
        self.wires: dict[bytes, MemoryWire] = {}
        receiver.send = self._send

    def close(self) -> None:
        for wire in list(self.wires.values()):
            wire.fail("connection lost")

    def _send(self, route: bytes, parts: tuple[Buffer, Buffer]) -> None:
        if route in self.wires:
            asyncio.get_running_loop().call_soon(self.wires[route].deliver, list(parts))


class MemoryWire:
    """A Wire that passes copies through the event loop."""

    def __init__(self, host: MemoryHost) -> None:
        self._host = host
        self._route = f"{id(self)}".encode()
        self._received: Callable[[Parts], None] = lambda parts: None
        self._lost: Callable[[str], None] = lambda reason: None

    async def open(self, received: Callable[[Parts], None], lost: Callable[[str], None]) -> None:
        self._received, self._lost = received, lost
        self._host.wires[self._route] = self

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        if self._route not in self._host.wires:
            raise WorkerLost("connection lost")
        altered = self._host.alter([bytes(part) for part in parts])
        if altered is not None:
            asyncio.get_running_loop().call_soon(self._host.receiver.take, self._route, altered)

    def close(self) -> None:
        self._host.wires.pop(self._route, None)

    def deliver(self, parts: Parts) -> None:
        if self._route in self._host.wires:
            self._received(parts)

    def fail(self, reason: str) -> None:
        self.close()
        self._lost(reason)


def memory_link(host: MemoryHost, mine: Hello | None = None, **options: float) -> FramedLink:
    return FramedLink(MemoryWire(host), mine or prefill_hello(), DECODE_PEER, **options)


def put(body: bytes) -> Fill:
    """Fills a room with `body`."""

    def fill(room: Room) -> None:
        if isinstance(room, memoryview):
            room[:] = body
        else:
            room.write(torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else NOTHING)

    return fill


NOTHING = torch.empty(0, dtype=torch.uint8)


def inside(room: Room) -> bytes:
    """What lies in it now."""
    if isinstance(room, memoryview):
        return bytes(room)
    assert isinstance(room, _Place)
    return ctypes.string_at(room._wire._address + room._start, room.size)


class FakeDriver:
    """Memory of the host in place of a device's, and of one process in place of two."""

    def __init__(self) -> None:
        self.exported: dict[int, tuple[bytes, np.ndarray]] = {}  # by address
        self.opened: list[int] = []
        self.refuses = False
        self.fails = False

    def export(self, size: int) -> tuple[int, bytes]:
        if self.refuses:
            raise OSError("out of memory")
        memory, handle = np.zeros(size, np.uint8), os.urandom(64)
        self.exported[memory.ctypes.data] = handle, memory
        return memory.ctypes.data, handle

    def free(self, address: int) -> None:
        assert address not in self.opened, "freed while a sender has it open"
        del self.exported[address]

    def open(self, handle: bytes) -> int:
        for address, (known, _) in self.exported.items():
            if handle == known and not self.refuses:
                self.opened.append(address)
                return address
        raise OSError("cannot be reached")

    def close(self, address: int) -> None:
        self.opened.remove(address)

    def copy(self, to: int, source: int, size: int) -> None:
        if self.fails:
            raise OSError("an illegal address")
        ctypes.memmove(to, source, size)


def fake_ipc(late: bool = False) -> CudaIpc:
    gpu = FakeDevice(late)
    return CudaIpc(gpu, FakeDriver(), Digests(gpu))


class Yes:
    """Takes everything that a Receiver posts, and agrees unless told to hold its answers back."""

    def __init__(self) -> None:
        self.arrived: list[Arrived] = []
        self.answer: Callable[[Arrived], tuple[Fields, str]] = self.agree
        self.silent = False

    @staticmethod
    def agree(arrived: Arrived) -> tuple[Fields, str]:
        return (Sealed() if isinstance(arrived.fields, Manifest) else Ack()), ""

    def __call__(self, arrived: Arrived) -> None:
        self.arrived.append(arrived)
        if not self.silent:
            arrived.reply(*self.answer(arrived))


class DecodeSide:
    """Pool, cache, landings and receiver of a decode worker, its step thread being the loop."""

    def __init__(
        self,
        block_size: int = 4,
        blocks: int = 64,
        layout: KVLayout = LAYOUT,
        gpu: FakeDevice | None = None,
        **options: int,
    ) -> None:
        self.clock: Callable[[], float] = lambda: 0.0
        self.pool = BlockPool(blocks, block_size)
        self.cache = KVCache(layout, blocks, block_size, gpu=gpu)
        self.landings = Landings(self.pool, self.cache, DECODE_PEER, "memory")
        self.sealed: list[tuple[str, int]] = []
        loop = asyncio.get_running_loop()
        self.receiver = Receiver(hello(layout=layout), self._post, loop.call_soon, **options)

    @property
    def now(self) -> float:
        return self.clock()

    def _post(self, arrived: Arrived) -> None:
        key = self.landings.receive(arrived, self.now)
        if key is not None:
            self.sealed.append(key)

    def content(self, blocks: list[Block], start: int, stop: int) -> bytes:
        return content(self.cache, blocks, start, stop)


def content(cache: KVCache, blocks: list[Block], start: int, stop: int) -> bytes:
    """All layers' KV of these tokens, group after group."""
    slots = cache.slots_of(blocks, start, stop)
    spans, first = [], 0
    for group in cache.layout.groups:
        spans.append(range(first, first + group.layers))
        first += group.layers
    return b"".join(bytes(cache.gather(span, slots)) for span in spans)


def request(name: str, tokens: int) -> Request:
    return Request(name, tuple(range(tokens)))
