"""The contract that every transport's Link passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
import torch
import zmq

from cluster.credentials import Credentials
from cluster.errors import HandshakeRefused, TransferFailed, WorkerLost
from cluster.messages import PROTOCOL, Fingerprint, Hello, KVLayout, LayerGroup, Peer
from engine.staging import DeviceBody, Room
from kvtransfer.cuda_ipc import CudaIpcHost, CudaIpcWire, _Copy
from kvtransfer.frames import (
    MAX_BODY,
    Ack,
    Address,
    Box,
    Chunk,
    Manifest,
    Reject,
    Renew,
    Sealed,
    combined,
    digest_of,
)
from kvtransfer.link import Credit, FramedLink, Heap
from kvtransfer.nearest import Nearest
from kvtransfer.receiver import Receiver
from kvtransfer.shared_memory import SharedMemoryHost, SharedMemoryWire
from kvtransfer.zeromq import ZmqHost, ZmqWire
from tests.kvtransfer.fakes import (
    DECODE_PEER,
    NOTHING,
    PREFILL_PEER,
    MemoryHost,
    MemoryWire,
    Yes,
    fake_ipc,
    hello,
    inside,
    prefill_hello,
    put,
)

ADDRESS = Address("ab" * 16, 1, DECODE_PEER.incarnation, 1)
BOX = Box(range(2), range(2), range(5))
CREDIT = 300_000
KINDS = ("memory", "zeromq", "curve", "shared memory", "near", "far", "cuda ipc", "nearest")
_SENDER, _RECEIVER = (zmq.curve_keypair()[1] for _ in range(2))
KEYS = Credentials("worker", b"", b"", b"", _SENDER, _RECEIVER)


def chunk(index: int = 0) -> Chunk:
    return Chunk(ADDRESS, index, BOX, "float32")


def anything(room: Room) -> None:
    """For bodies whose content does not matter."""
    put(bytes(len(room)))(room)


class Rig:
    """One receiver behind some transport, and links to it."""

    def __init__(self, kind: str) -> None:
        self.stage = Yes()
        self.kind = kind
        loop = asyncio.get_running_loop()
        self.receiver = Receiver(hello(), self.stage, loop.call_soon_threadsafe, CREDIT)
        self.links: list[FramedLink] = []
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.hosts: list[MemoryHost | ZmqHost | SharedMemoryHost | CudaIpcHost] = []
        self.ipc = fake_ipc()
        if kind == "memory":
            self.hosts.append(MemoryHost(self.receiver))
        self.keys = KEYS if kind == "curve" else None
        if kind in ("zeromq", "curve", "far"):
            self.zmq = ZmqHost(self.context, self.receiver, self.keys)
            self.zmq.start()
            self.hosts.append(self.zmq)
        if kind in ("shared memory", "near", "nearest"):
            near = SharedMemoryHost(self.receiver)
            near.start(DECODE_PEER)
            self.hosts.append(near)
        if kind in ("cuda ipc", "nearest"):
            gpu = CudaIpcHost(self.receiver, self.ipc, MAX_BODY)
            gpu.start(DECODE_PEER)
            self.hosts.append(gpu)

    def link(
        self, mine: Hello | None = None, peer: Peer = DECODE_PEER, timeout: float = 5.0
    ) -> FramedLink:
        mine = mine or prefill_hello()
        near = SharedMemoryWire(DECODE_PEER, 1 << 20)
        if self.kind == "memory":
            assert isinstance(self.hosts[0], MemoryHost)
            link = FramedLink(MemoryWire(self.hosts[0]), mine, peer, answer_timeout=timeout)
        elif self.kind == "shared memory":
            link = FramedLink(near, mine, peer, rooms=near, answer_timeout=timeout)
        elif self.kind == "cuda ipc":
            gpu = CudaIpcWire(DECODE_PEER, self.ipc)
            link = FramedLink(gpu, mine, peer, rooms=gpu, answer_timeout=timeout)
        elif self.kind in ("zeromq", "curve"):
            wire = ZmqWire(self.context, self.zmq.address, self.keys)
            link = FramedLink(wire, mine, peer, answer_timeout=timeout)
        else:
            address = self.zmq.address if self.kind == "far" else "tcp://nowhere"
            gpu = CudaIpcWire(DECODE_PEER, self.ipc)
            nearest = Nearest((gpu, near), ZmqWire(self.context, address))
            link = FramedLink(nearest, mine, peer, rooms=nearest, answer_timeout=timeout)
        self.links.append(link)
        return link

    async def opened(self, mine: Hello | None = None, timeout: float = 5.0) -> FramedLink:
        link = self.link(mine, timeout=timeout)
        await link.open()
        return link

    def alter(self, change: Callable[[list[bytes]], list[bytes] | None]) -> None:
        """Stands between the network and the receiver."""
        take = self.receiver.take

        def altered(route: bytes, parts: list) -> None:  # type: ignore[type-arg]
            changed = change([bytes(part) for part in parts])
            if changed is not None:
                if isinstance(parts[1], DeviceBody):
                    changed[1] = self.on_device(changed[1])  # type: ignore[call-overload]
                take(route, changed)  # type: ignore[arg-type]

        self.receiver.take = altered  # type: ignore[method-assign]

    def on_device(self, body: bytes) -> DeviceBody:
        content = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else NOTHING
        return _Copy(self.ipc.device, content, self.ipc.digests.queue(content))

    def digest(self, body: bytes) -> int:
        """As this transport makes it."""
        return digest_of(self.on_device(body) if self.kind in ("cuda ipc", "nearest") else body)

    def end_hosts(self) -> None:
        for host in self.hosts:
            host.close()

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.end_hosts()
        self.context.term()


@pytest.fixture(params=KINDS)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.close()


async def test_a_chunk_arrives_as_it_was_read_and_its_digest_comes_back(rig: Rig) -> None:
    link = await rig.opened()
    small, large = b"tiny", bytes(range(256)) * 1000
    for index, body in enumerate((small, large, b"")):
        digest = await link.send(chunk(index), len(body), put(body))
        assert digest == rig.digest(body)
        arrived = rig.stage.arrived[index]
        assert (arrived.fields, arrived.digest) == (chunk(index), digest)
        assert bytes(arrived.body) == body


async def test_many_sends_at_once_are_each_answered(rig: Rig) -> None:
    link = await rig.opened()
    bodies = [bytes([index]) * 70_000 for index in range(40)]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(link.send(chunk(index), len(body), put(body)))
            for index, body in enumerate(bodies)
        ]
    assert [task.result() for task in tasks] == [rig.digest(body) for body in bodies]
    assert {a.fields.index for a in rig.stage.arrived if isinstance(a.fields, Chunk)} == {
        *range(40)
    }


async def test_opening_again_does_nothing_and_at_once_shares_one_handshake(rig: Rig) -> None:
    link = rig.link()
    await asyncio.gather(link.open(), link.open(), link.open())
    await link.open()
    assert rig.receiver.counters["evicted"] == 0
    await link.send(chunk(), 1, put(b"x"))


async def test_a_caller_that_gives_up_opening_does_not_spoil_it_for_others(rig: Rig) -> None:
    link = rig.link()
    first = asyncio.create_task(link.open())
    await asyncio.sleep(0)
    second = asyncio.create_task(link.open())
    first.cancel()
    await second
    await link.send(chunk(), 1, put(b"x"))


async def test_sealing_and_renewing(rig: Rig) -> None:
    link = await rig.opened()
    manifest = Manifest(ADDRESS, 3, range(5), combined([]))
    await link.renew(Renew(ADDRESS))
    assert await link.seal(manifest)
    assert [arrived.fields for arrived in rig.stage.arrived] == [Renew(ADDRESS), manifest]


async def test_what_the_peer_rejects_fails_with_its_reason_and_the_link_lives(rig: Rig) -> None:
    link = await rig.opened()
    rig.stage.answer = lambda arrived: (Reject(), "stale generation")
    manifest = Manifest(ADDRESS, 0, range(0), combined([]))
    for verb in (
        lambda: link.send(chunk(), 1, put(b"x")),
        lambda: link.renew(Renew(ADDRESS)),
        lambda: link.seal(manifest),
    ):
        with pytest.raises(TransferFailed, match="d: stale generation"):
            await verb()
    rig.stage.answer = lambda arrived: (Ack(), "")
    assert not await link.seal(manifest)
    rig.stage.answer = lambda arrived: (Sealed(), "")
    assert await link.seal(manifest)
    with pytest.raises(TransferFailed, match="d: Sealed is no answer to that"):
        await link.renew(Renew(ADDRESS))
    assert not link.lost


async def test_what_is_asked_once_a_chunk_is_under_way_arrives_behind_it(rig: Rig) -> None:
    link = await rig.opened()
    rig.stage.silent = True
    digests: list[int] = []
    sending = asyncio.create_task(link.send(chunk(), 4, put(b"good"), digests.append))
    while not digests:
        await asyncio.sleep(0)
    assert digests == [rig.digest(b"good")]
    rig.stage.silent = False
    await link.renew(Renew(ADDRESS))
    assert [type(arrived.fields) for arrived in rig.stage.arrived] == [Chunk, Renew]
    rig.stage.arrived[0].reply(Ack(), "")
    assert await sending == digests[0]


@pytest.mark.parametrize("given_up", [False, True])
async def test_the_memory_of_a_body_is_nobody_elses_before_its_answer(
    rig: Rig, given_up: bool
) -> None:
    link = await rig.opened()
    rig.stage.silent = True
    rooms: list[Room] = []

    def fill(content: bytes) -> Callable[[Room], None]:
        def fill(room: Room) -> None:
            put(content)(room)
            rooms.append(room)

        return fill

    sends = [asyncio.create_task(link.send(chunk(i), 3, fill(b"%03d" % i))) for i in range(5)]
    while len(rig.stage.arrived) < 5:
        await asyncio.sleep(0)
    if given_up:
        for task in sends:
            task.cancel()
        await asyncio.wait(sends)
    others = [asyncio.create_task(link.send(chunk(i), 3, fill(b"new"))) for i in range(5, 9)]
    while len(rig.stage.arrived) < 9:
        await asyncio.sleep(0)
    assert [inside(room) for room in rooms[:5]] == [b"%03d" % i for i in range(5)]
    for arrived in rig.stage.arrived:
        arrived.reply(Ack(), "")
    await asyncio.gather(*others)
    if not given_up:
        await asyncio.gather(*sends)


async def test_a_body_that_cannot_be_read_costs_no_credit(rig: Rig) -> None:
    link = await rig.opened()

    def fail(room: Room) -> None:
        raise RuntimeError("no KV")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="no KV"):
            await link.send(chunk(), CREDIT, fail)
    await link.send(chunk(), CREDIT, anything)
    assert len(rig.stage.arrived) == 1


def flip(parts: list[bytes]) -> list[bytes]:
    return [parts[0], bytes([parts[1][0] ^ 1]) + parts[1][1:]]


@pytest.mark.parametrize("damaged", [1, 2, 3])
async def test_a_damaged_body_is_sent_again_twice_and_never_taken(rig: Rig, damaged: int) -> None:
    link = await rig.opened()
    left = damaged

    def change(parts: list[bytes]) -> list[bytes]:
        nonlocal left
        left -= 1
        return flip(parts) if left >= 0 else parts

    rig.alter(change)
    sending = link.send(chunk(), 4, put(b"good"))
    if damaged <= 2:
        await sending
        assert [bytes(arrived.body) for arrived in rig.stage.arrived] == [b"good"]
        assert link.resent == damaged
    else:
        with pytest.raises(TransferFailed, match="damaged 3 times"):
            await sending
        assert rig.stage.arrived == []
    assert rig.receiver.counters["damaged"] == damaged


async def test_a_peer_that_does_not_answer_is_lost(rig: Rig) -> None:
    link = await rig.opened(timeout=0.05)
    rig.stage.silent = True
    with pytest.raises(WorkerLost, match=r"no answer within 0\.05 s"):
        await link.send(chunk(), 1, put(b"x"))
    assert link.lost
    with pytest.raises(WorkerLost):
        await link.renew(Renew(ADDRESS))


async def test_a_lost_frame_loses_the_link_and_nothing_is_half_taken(rig: Rig) -> None:
    link = await rig.opened(timeout=0.05)
    rig.alter(lambda parts: None)
    with pytest.raises(WorkerLost):
        await link.send(chunk(), 1, put(b"x"))
    assert rig.stage.arrived == []


LAYOUT = KVLayout((LayerGroup(2, 2, 4),), "bfloat16")


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        (prefill_hello(protocol=9), ["protocol version", "9", str(PROTOCOL)]),
        (
            prefill_hello(fingerprint=Fingerprint("other", "weights")),
            ["configuration", "other", "config"],
        ),
        (
            prefill_hello(fingerprint=Fingerprint("config", "others")),
            ["weights others meets weights"],
        ),
        (
            prefill_hello(layout=LAYOUT),
            ["KV layout 2x2x4/0:bfloat16 meets 2x2x4/0+1x3x2/8:float32"],
        ),
    ],
)
async def test_a_misfit_is_refused_with_both_values(
    rig: Rig, mine: Hello, words: list[str]
) -> None:
    link = rig.link(mine)
    with pytest.raises(HandshakeRefused) as refused:
        await link.open()
    assert all(word in refused.value.message for word in words)
    assert link.lost
    assert rig.receiver.counters["refused"] == 1


async def test_another_start_of_the_worker_than_meant_refuses(rig: Rig) -> None:
    link = rig.link(peer=replace(DECODE_PEER, incarnation=77))
    with pytest.raises(HandshakeRefused, match=f"incarnation 77 meets {DECODE_PEER.incarnation}"):
        await link.open()


async def test_another_name_behind_the_address_is_noticed(rig: Rig) -> None:
    link = rig.link(peer=replace(DECODE_PEER, name="e"))
    with pytest.raises(HandshakeRefused, match="answered for"):
        await link.open()


async def test_a_new_start_evicts_the_old_one_and_outlives_its_return(rig: Rig) -> None:
    old = await rig.opened()
    rig.stage.silent = True
    waiting = asyncio.create_task(old.send(chunk(), 1, put(b"x")))
    while not rig.stage.arrived:
        await asyncio.sleep(0)
    new = await rig.opened(prefill_hello(peer=replace(PREFILL_PEER, incarnation=12)))
    with pytest.raises(WorkerLost, match="replaced by incarnation 12"):
        await waiting
    assert old.lost
    assert rig.receiver.counters["evicted"] == 1
    rig.stage.silent = False
    await new.send(chunk(), 1, put(b"x"))
    await rig.opened()  # the old one: it was stopped, and still had an order
    while not new.lost:
        await asyncio.sleep(0)
    again = await rig.opened(prefill_hello(peer=replace(PREFILL_PEER, incarnation=12)))
    await again.send(chunk(), 1, put(b"x"))


async def test_the_same_start_may_connect_again(rig: Rig) -> None:
    first = await rig.opened()
    second = await rig.opened()
    await second.send(chunk(), 1, put(b"x"))
    while not first.lost:
        await asyncio.sleep(0)


async def test_frames_from_an_evicted_link_are_dropped_and_counted(rig: Rig) -> None:
    old = await rig.opened()
    rig.receiver._links.clear()
    with pytest.raises(WorkerLost, match="no handshake"):
        await old.send(chunk(), 1, put(b"x"))
    assert rig.receiver.counters["fenced"] == 1
    assert rig.stage.arrived == []


async def test_credit_is_never_exceeded_and_all_gets_through(rig: Rig) -> None:
    link = await rig.opened()
    rig.stage.silent = True
    size, total = 100_000, 12
    sends = [asyncio.create_task(link.send(chunk(index), size, anything)) for index in range(total)]
    for done in range(total):
        while len(rig.stage.arrived) == done:
            await asyncio.sleep(0)
        assert len(rig.stage.arrived) - done <= CREDIT // size
        rig.stage.arrived[done].reply(Ack(), "")
    await asyncio.gather(*sends)
    assert rig.receiver.counters["overdrawn"] == 0


async def test_credit_of_a_cancelled_send_comes_back_with_its_answer_only(rig: Rig) -> None:
    link = await rig.opened()
    rig.stage.silent = True
    first = asyncio.create_task(link.send(chunk(0), CREDIT, anything))
    while not rig.stage.arrived:
        await asyncio.sleep(0)
    first.cancel()
    second = asyncio.create_task(link.send(chunk(1), 1, put(b"x")))
    await asyncio.wait([first])
    assert len(rig.stage.arrived) == 1
    rig.stage.silent = False
    rig.stage.arrived[0].reply(Ack(), "")
    await second
    assert rig.receiver.counters["overdrawn"] == 0


async def test_reading_is_not_called_after_cancel(rig: Rig) -> None:
    link = await rig.opened()
    rig.stage.silent = True
    blocking = asyncio.create_task(link.send(chunk(0), CREDIT, anything))
    while not rig.stage.arrived:
        await asyncio.sleep(0)
    read: list[int] = []
    waiting = asyncio.create_task(link.send(chunk(1), 1, lambda room: read.append(1)))
    await asyncio.sleep(0)
    waiting.cancel()
    rig.stage.arrived[0].reply(Ack(), "")
    await blocking
    assert read == []


async def test_a_chunk_larger_than_all_credit_fails_at_once(rig: Rig) -> None:
    link = await rig.opened()
    with pytest.raises(TransferFailed, match=str(CREDIT)):
        await link.send(chunk(), CREDIT + 1, anything)


async def test_the_receiver_going_away_loses_the_link_for_all_who_wait(rig: Rig) -> None:
    link = await rig.opened()
    rig.stage.silent = True
    sends = [asyncio.create_task(link.send(chunk(i), 150_000, anything)) for i in range(4)]
    while len(rig.stage.arrived) < 2:
        await asyncio.sleep(0)
    rig.end_hosts()
    results = await asyncio.gather(*sends, return_exceptions=True)
    assert [type(result) for result in results] == [WorkerLost] * 4
    assert link.lost


async def test_closing_ends_every_wait_and_may_be_repeated(rig: Rig) -> None:
    link = await rig.opened()
    rig.stage.silent = True
    sends = [asyncio.create_task(link.send(chunk(i), 200_000, anything)) for i in range(3)]
    while not rig.stage.arrived:
        await asyncio.sleep(0)
    link.close()
    link.close()
    results = await asyncio.gather(*sends, return_exceptions=True)
    assert [type(result) for result in results] == [WorkerLost] * 3


async def test_credit_is_first_come_first_served() -> None:
    credit, order = Credit(10), []

    async def take(name: str, size: int) -> None:
        await credit.take(size)
        order.append(name)

    await credit.take(8)
    tasks = [asyncio.create_task(take(*what)) for what in [("large", 9), ("small", 1), ("b", 1)]]
    await asyncio.sleep(0)
    tasks[2].cancel()
    credit.give(8)
    await asyncio.wait(tasks)
    assert order == ["large", "small"]
    assert credit.free == 0


async def test_who_waits_behind_one_that_gives_up_is_served() -> None:
    credit = Credit(10)
    await credit.take(8)
    large = asyncio.create_task(credit.take(9))
    small = asyncio.create_task(credit.take(2))
    await asyncio.sleep(0)
    large.cancel()
    await small
    assert credit.free == 0


async def test_credit_served_and_cancelled_in_one_breath_is_given_back() -> None:
    credit = Credit(10)
    await credit.take(10)
    waiting = asyncio.create_task(credit.take(10))
    await asyncio.sleep(0)
    credit.give(10)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert credit.free == 10


async def test_credit_beyond_what_is_calm_is_for_a_silent_peer_only() -> None:
    credit = Credit(100, calm=20)
    await credit.take(10)
    await credit.take(10)
    more = [asyncio.create_task(credit.take(10)) for _ in range(3)]
    await asyncio.sleep(0)
    assert credit.free == 80
    credit.give(10)  # it answers: one more
    await asyncio.wait(more, return_when=asyncio.FIRST_COMPLETED)
    assert credit.free == 80
    await asyncio.gather(*more)  # it does not
    assert credit.free == 60


async def test_two_may_be_under_way_however_large() -> None:
    credit = Credit(200, calm=20)
    await credit.take(50)
    await credit.take(50)
    third = asyncio.create_task(credit.take(50))
    await asyncio.sleep(0)
    assert credit.free == 100
    await third


async def test_memory_is_used_again_where_the_transport_copies() -> None:
    heap = Heap()
    first = await heap.room(1000)
    other = await heap.room(1000)
    first[:] = b"1" * 1000
    heap.free(first)
    smaller = await heap.room(500)
    assert bytes(first) == b"1" * 1000
    assert (await heap.room(1000)) is first
    assert smaller is not first and other is not first
