"""What can go wrong between two GPUs: with fakes of them, and on a real one where there is one."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

import numpy as np
import pytest
import torch
import zmq

from cluster.errors import BatonError, Cancelled, TransferFailed, WorkerLost
from cluster.messages import Landing
from engine.cache import KVCache
from engine.cuda_staging import DeviceStaging
from engine.staging import TURNS
from kvtransfer import cuda_ipc
from kvtransfer.cuda_ipc import CudaIpc, CudaIpcHost, CudaIpcWire, Digests
from kvtransfer.frames import MAX_BODY, Address, Box, Chunk, Renew, encode
from kvtransfer.link import FramedLink
from kvtransfer.near import _PLACE, _message
from kvtransfer.nearest import link_to
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Announcement, Handoff, Sender
from kvtransfer.shared_memory import SharedMemoryHost
from kvtransfer.unix import name_of, new_socket
from kvtransfer.zeromq import ZmqHost
from tests.engine.fake_device import FakeDevice
from tests.kvtransfer.fakes import (
    DECODE_PEER,
    LAYOUT,
    FakeDriver,
    Yes,
    fake_ipc,
    hello,
    inside,
    prefill_hello,
    put,
    request,
)
from tests.kvtransfer.test_sender import Pair, turns

ADDRESS = Address("ab" * 16, 1, DECODE_PEER.incarnation, 1)
CHUNK = Chunk(ADDRESS, 0, Box(range(1), range(1), range(1)), "float32")


class Side:
    """A receiver that is reached through its device's memory, and links to it."""

    def __init__(self) -> None:
        self.stage = Yes()
        later = asyncio.get_running_loop().call_soon_threadsafe
        self.receiver = Receiver(hello(), self.stage, later, 64 << 20)
        self.theirs = fake_ipc()
        self.ours = CudaIpc(FakeDevice(), self.theirs.driver, Digests(FakeDevice()))
        self.host = CudaIpcHost(self.receiver, self.theirs, MAX_BODY)
        self.host.start(DECODE_PEER)
        self.links: list[FramedLink] = []

    @property
    def driver(self) -> FakeDriver:
        assert isinstance(self.theirs.driver, FakeDriver)
        return self.theirs.driver

    async def opened(self) -> tuple[FramedLink, CudaIpcWire]:
        wire = CudaIpcWire(DECODE_PEER, self.ours)
        link = FramedLink(wire, prefill_hello(), DECODE_PEER, rooms=wire)
        self.links.append(link)
        await link.open()
        return link, wire

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.host.close()


@pytest.fixture
async def side() -> AsyncIterator[Side]:
    side = Side()
    yield side
    side.close()


def late(ipc: CudaIpc, late: bool = True) -> FakeDevice:
    assert isinstance(ipc.device, FakeDevice)
    ipc.device.late = late
    return ipc.device


async def test_a_body_is_judged_when_the_copy_is_whole_and_in_its_turn(side: Side) -> None:
    link, _ = await side.opened()
    gpu = late(side.theirs)
    digests: list[int] = []
    first = asyncio.create_task(link.send(CHUNK, 8, put(b"content!"), digests.append))
    while not digests:
        await asyncio.sleep(0)
    renewing = asyncio.create_task(link.renew(Renew(ADDRESS)))
    for _ in range(2 * TURNS):
        await asyncio.sleep(0.0001)
    assert side.stage.arrived == []
    gpu.marks[-1].over = True
    assert await first == digests[0]
    await renewing
    assert [type(arrived.fields) for arrived in side.stage.arrived] == [Chunk, Renew]
    assert not gpu.marks[-1].waited


async def test_what_arrived_is_out_of_the_senders_reach(side: Side) -> None:
    link, wire = await side.opened()
    side.stage.silent = True
    sending = asyncio.create_task(link.send(CHUNK, 8, put(b"content!")))
    while not side.stage.arrived:
        await asyncio.sleep(0)
    wire.write(0, torch.zeros(8, dtype=torch.uint8))
    assert bytes(side.stage.arrived[0].body) == b"content!"
    side.stage.arrived[0].reply(Yes.agree(side.stage.arrived[0])[0], "")
    await sending


async def test_a_region_written_too_early_is_a_damaged_frame(side: Side) -> None:
    link, wire = await side.opened()
    send, spoilt = wire.send, 0

    def spoil(parts: tuple) -> None:  # type: ignore[type-arg]
        nonlocal spoilt
        send(parts)
        if len(parts[1]) == 8:
            spoilt += 1
            wire.write(0, torch.zeros(8, dtype=torch.uint8))

    wire.send = spoil  # type: ignore[method-assign]
    with pytest.raises(TransferFailed, match="damaged 3 times"):
        await link.send(CHUNK, 8, put(b"content!"))
    assert spoilt == side.receiver.counters["damaged"] == 3
    assert side.stage.arrived == []


@pytest.mark.parametrize(
    ("start", "size"), [(MAX_BODY, 8), (MAX_BODY - 4, 8), (2**64 - 2, 8), (0, MAX_BODY + 1)]
)
async def test_a_place_outside_the_memory_is_a_bad_frame(side: Side, start: int, size: int) -> None:
    with new_socket() as rogue:
        rogue.connect(name_of(cuda_ipc.KIND, DECODE_PEER))
        rogue.send(b"cuda ipc 1")
        await heard(rogue)
        header, _ = encode(2, CHUNK, b"12345678")
        rogue.send(_PLACE.pack(len(header), start, size) + header)
        while not side.receiver.counters["bad_frames"]:
            await asyncio.sleep(0)
        assert side.stage.arrived == []


async def heard(connected: socket.socket) -> bytes:
    while True:
        with suppress(BlockingIOError):
            return connected.recv(1 << 16)
        await asyncio.sleep(0)


@pytest.mark.parametrize("words", [b"ring", b"cuda ipc 1 and more", b"cuda ipc 2"])
async def test_who_speaks_another_language_gets_no_memory(side: Side, words: bytes) -> None:
    with new_socket() as rogue:
        rogue.connect(name_of(cuda_ipc.KIND, DECODE_PEER))
        rogue.send(words)
        assert await heard(rogue) == b""
    assert side.driver.exported == {}


@pytest.mark.parametrize(
    "answer", [b"", b"ready", cuda_ipc._HANDLE.pack(MAX_BODY - 1, b"x" * 64), b"\0" * 72]
)
async def test_memory_that_is_none_is_not_used(answer: bytes) -> None:
    with new_socket() as listener:
        listener.bind(name_of(cuda_ipc.KIND, DECODE_PEER))
        listener.listen()
        wire = CudaIpcWire(DECODE_PEER, fake_ipc())
        opening = asyncio.create_task(wire.open(lambda parts: None, lambda reason: None))
        await asyncio.sleep(0)
        with listener.accept()[0] as connected:
            connected.send(answer or _message((b"", b"")))
            with pytest.raises(WorkerLost, match="no CUDA IPC"):
                await opening
        wire.close()


async def test_memory_is_freed_when_its_sender_has_left_and_closed_it(side: Side) -> None:
    link, _ = await side.opened()
    await link.send(CHUNK, 8, put(b"content!"))
    assert (len(side.driver.exported), len(side.driver.opened)) == (1, 1)
    link.close()
    assert side.driver.opened == []
    while side.driver.exported:
        await asyncio.sleep(0)


async def test_nobody_writes_to_memory_that_was_closed(side: Side) -> None:
    link, wire = await side.opened()
    gpu = late(side.ours)
    room = await wire.room(8)
    put(b"content!")(room)
    assert inside(room) == b"content!"
    assert not gpu.marks[-1].over
    link.close()
    assert gpu.marks[-1].waited  # closed only then
    with pytest.raises(WorkerLost, match="closed"):
        put(b"too late")(room)


async def test_a_copy_under_way_ends_before_its_memory_is_freed(side: Side) -> None:
    link, _ = await side.opened()
    gpu = late(side.theirs)
    sending = asyncio.create_task(link.send(CHUNK, 8, put(b"content!")))
    while not gpu.marks:
        await asyncio.sleep(0)
    link.close()
    with pytest.raises(WorkerLost):
        await sending
    while side.driver.exported:
        await asyncio.sleep(0)
    assert gpu.marks[-1].waited
    assert side.stage.arrived == []


async def test_a_copy_that_fails_ends_the_link(side: Side) -> None:
    link, wire = await side.opened()
    sends = wire.send

    def fail(parts: tuple) -> None:  # type: ignore[type-arg]
        side.driver.fails = True
        sends(parts)

    wire.send = fail  # type: ignore[method-assign]
    with pytest.raises(WorkerLost):
        await link.send(CHUNK, 8, put(b"content!"))
    assert len(side.host) == 0


async def test_more_senders_than_there_is_memory_for_go_another_way(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ipc, "MAX_REGIONS", 1)
    await side.opened()
    wire = CudaIpcWire(DECODE_PEER, side.ours)
    with pytest.raises(WorkerLost, match="no CUDA IPC"):
        await wire.open(lambda parts: None, lambda reason: None)
    wire.close()


@pytest.mark.parametrize("near", [True, False])
async def test_without_such_memory_the_same_link_goes_another_way(side: Side, near: bool) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    host, shared = ZmqHost(context, side.receiver), SharedMemoryHost(side.receiver)
    host.start()
    if near:
        shared.start(DECODE_PEER)
    side.driver.refuses = True
    link = link_to(context, host.address, prefill_hello(), DECODE_PEER, ipc=side.ours)
    try:
        await link.open()
        assert len(shared) == near
        assert len(side.host) == 0
        room = await link._rooms.room(8)
        assert isinstance(room, memoryview)
        link._rooms.free(room)
    finally:
        link.close()
        shared.close()
        host.close()
        context.term()


async def test_with_such_memory_it_is_the_way(side: Side) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    shared = SharedMemoryHost(side.receiver)
    shared.start(DECODE_PEER)
    link = link_to(context, "tcp://nowhere", prefill_hello(), DECODE_PEER, ipc=side.ours)
    await link.open()
    assert (len(side.host), len(shared)) == (1, 0)
    link.close()
    shared.close()
    context.term()


def test_a_cache_on_the_host_has_none() -> None:
    assert CudaIpc.of(KVCache(hello().layout, 1, 1)) is None


def digest(content: bytes) -> int:
    digests = Digests(FakeDevice())
    return int(digests.queue(torch.frombuffer(bytearray(content), dtype=torch.uint8))[0]) % 2**64


def test_every_byte_counts_and_where_it_is() -> None:
    content = bytearray(np.random.default_rng(1).bytes(4000))
    known = {digest(content)}
    for at in range(len(content)):
        for bit in (1, 0x80):
            content[at] ^= bit
            known.add(digest(content))
            content[at] ^= bit
    for at in range(0, 3996, 4):
        content[at : at + 8] = content[at + 4 : at + 8] + content[at : at + 4]
        known.add(digest(content))
        content[at : at + 8] = content[at + 4 : at + 8] + content[at : at + 4]
    assert len(known) == 1 + 8000 + 999


def test_the_digest_is_the_same_everywhere() -> None:
    assert (
        digest(b"12345678")
        == (
            int.from_bytes(b"1234", "little") * 0xE220A8397B1DCDAF
            + int.from_bytes(b"5678", "little") * 0x6E789E6AA1B965F5
        )
        % 2**64
    )


class IpcPair(Pair):
    """A handoff's whole way, from one device's pages to another's."""

    def __init__(self) -> None:
        gpu = FakeDevice()
        super().__init__(gpu=gpu)
        self.ipc = CudaIpc(gpu, FakeDriver(), Digests(gpu))
        self.near = CudaIpcHost(self.decode.receiver, self.ipc)
        self.near.start(DECODE_PEER)

    def connect(self, landing: Landing) -> FramedLink:
        wire = CudaIpcWire(landing.peer, self.ipc)
        return FramedLink(wire, prefill_hello(), landing.peer, rooms=wire)


@pytest.fixture
async def pair() -> AsyncIterator[IpcPair]:
    pair = IpcPair()
    async with pair.sender:
        yield pair
    pair.near.close()


@pytest.mark.parametrize("step", [1000, 7])
async def test_content_arrives_and_never_sees_the_host(pair: IpcPair, step: int) -> None:
    pinned = pair.ipc.device.pinned_bytes  # type: ignore[attr-defined]
    pair.announce_all(pair.open(), step)
    assert await pair.outcome() is None
    chunks = pair.released[0][2].chunks
    assert pair.ipc.device.kept == chunks  # type: ignore[attr-defined]
    assert pair.ipc.device.pinned_bytes - pinned < 2 * chunks * 37 * 8 * 2 + 16 * chunks  # type: ignore[attr-defined]
    assert pair.started_content() == pair.content()


async def test_a_stale_generation_is_written_to_no_page(pair: IpcPair) -> None:
    handoff = pair.open()
    newer = pair.decode.landings.promise(request("r", pair.tokens), 2, 0.0)
    pair.announce(handoff, range(3), range(10))
    error: BatonError | None = await pair.outcome()
    assert isinstance(error, TransferFailed)
    assert "stale generation" in error.message
    assert newer.generation == 2
    assert not any(bytes(pair.decode.cache.gather(range(2), np.arange(100))))


async def test_a_cancelled_handoff_writes_nothing_afterwards(pair: IpcPair) -> None:
    gpu = late(pair.ipc)
    handoff = pair.open()
    pair.announce(handoff, range(3), range(37))
    while not gpu.marks:
        await asyncio.sleep(0)
    gpu.marks[0].over = True
    while gpu.gathers < 2:
        await asyncio.sleep(0)
    pair.sender.cancel(*handoff.key)
    assert isinstance(await pair.outcome(), Cancelled)
    assert isinstance(pair.cache._staging, DeviceStaging)
    assert all(desk.mark.done() for desk in pair.cache._staging._gathering)
    read = gpu.gathers
    await turns()
    assert gpu.gathers == read
    assert not pair.decode.landings.counters["chunks"]


RECEIVING = """
import asyncio, sys
from engine.cache import KVCache
from engine.blocks import BlockPool
from kvtransfer.cuda_ipc import CudaIpc, CudaIpcHost
from kvtransfer.landing import Landings
from kvtransfer.receiver import Receiver
from tests.kvtransfer.fakes import DECODE_PEER, LAYOUT, content, hello, request

async def main():
    cache = KVCache(LAYOUT, 30, 4, "cuda")
    landings = Landings(BlockPool(30, 4), cache, DECODE_PEER, "", 1e9)
    landing = landings.promise(request("r", 37), 1, 0.0)
    post = lambda arrived: landings.receive(arrived, 0.0)
    receiver = Receiver(hello(), post, asyncio.get_running_loop().call_soon_threadsafe)
    ipc = CudaIpc.of(cache)
    assert ipc is not None
    CudaIpcHost(receiver, ipc).start(DECODE_PEER)
    print(landing.id, flush=True)
    while (site := landings.start("r", 1)) is None:
        await asyncio.sleep(0.001)
    print(content(cache, site.blocks, 0, 37).hex(), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
async def test_on_a_gpu_content_arrives_in_another_process() -> None:

    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RECEIVING, stdin=-1, stdout=-1, env=dict(os.environ)
    )
    assert other.stdin is not None and other.stdout is not None
    other.stdout._limit = 1 << 20  # type: ignore[attr-defined]
    landing = Landing((await other.stdout.readline()).decode().strip(), 1, DECODE_PEER, "", 0, 60)
    cache = KVCache(LAYOUT, 40, 1, "cuda")
    for layer in range(LAYOUT.layers):
        cache.keys(layer).normal_()
        cache.values(layer).normal_()
    ipc = CudaIpc.of(cache)
    assert ipc is not None

    def connect(landing: Landing) -> FramedLink:
        wire = CudaIpcWire(landing.peer, ipc)
        return FramedLink(wire, prefill_hello(), landing.peer, rooms=wire)

    errors: asyncio.Queue[BatonError | None] = asyncio.Queue()
    sender = Sender(cache, connect, lambda handoff, error, carried: errors.put_nowait(error), 700)
    slots = np.random.default_rng(5).permutation(40)[:37]
    async with sender:
        sender.open(Handoff("r", 1, landing, 37))
        sender.announce("r", 1, Announcement(range(3), range(37), slots, cache.mark()))
        sender.finish("r", 1)
        assert await errors.get() is None
        arrived = bytes.fromhex((await other.stdout.readline()).decode())
    expected = b"".join(bytes(cache.gather(span, slots)) for span in (range(2), range(2, 3)))
    assert arrived == expected
    other.stdin.close()
    assert await other.wait() == 0
