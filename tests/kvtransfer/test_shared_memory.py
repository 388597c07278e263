"""What can go wrong with memory that two processes share."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import zmq

from cluster import metrics
from cluster.errors import WorkerLost
from kvtransfer import near, unix
from kvtransfer.frames import Ack, Address, Box, Buffer, Chunk, decode, digest_of, encode
from kvtransfer.link import FramedLink
from kvtransfer.near import _PLACE, _message
from kvtransfer.nearest import link_to
from kvtransfer.receiver import Receiver
from kvtransfer.shared_memory import KIND, SharedMemoryHost, SharedMemoryWire
from kvtransfer.unix import name_of, new_socket
from kvtransfer.zeromq import ZmqHost
from tests.kvtransfer.fakes import (
    DECODE_PEER,
    DecodeSide,
    Shown,
    Yes,
    hello,
    prefill_hello,
    put,
    request,
)

ADDRESS = Address("ab" * 16, 1, DECODE_PEER.incarnation, 1)
CHUNK = Chunk(ADDRESS, 0, Box(range(1), range(1), range(1)), "float32")
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Side:
    """A receiver that is reached through shared memory, and links to it."""

    def __init__(self) -> None:
        self.stage = Yes()
        later = asyncio.get_running_loop().call_soon_threadsafe
        self.receiver = Receiver(hello(), self.stage, later, 1 << 20)
        self.host = SharedMemoryHost(self.receiver)
        self.host.start(DECODE_PEER)
        self.links: list[FramedLink] = []

    async def opened(self, ring_bytes: int = 1 << 20, **options: float) -> FramedLink:
        wire = SharedMemoryWire(DECODE_PEER, ring_bytes)
        link = FramedLink(wire, prefill_hello(), DECODE_PEER, rooms=wire, **options)
        self.links.append(link)
        await link.open()
        return link

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.host.close()


@pytest.fixture
async def side() -> AsyncIterator[Side]:
    side = Side()
    yield side
    side.close()


class Rogue:
    """A sender that follows no rules."""

    def __init__(self, size: int = 1 << 16, seals: int = SEALS) -> None:
        self.socket = new_socket()
        self.socket.connect(name_of(KIND, DECODE_PEER))
        self.descriptor = os.memfd_create("rogue", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, size)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
        self.memory = mmap.mmap(self.descriptor, size)

    def offer(self, *descriptors: int, message: bytes = b"ring") -> None:
        socket.send_fds(self.socket, [message], list(descriptors) or [self.descriptor])

    async def heard(self) -> bytes:
        """The next message; empty when it was shown the door."""
        while True:
            with suppress(BlockingIOError):
                return self.socket.recv(1 << 16)
            await asyncio.sleep(0)

    async def greet(self) -> None:
        from cluster.wire.codec import encode_hello
        from kvtransfer.frames import Greeting

        self.offer()
        assert await self.heard() == b"ready"
        greeting = Greeting(DECODE_PEER.incarnation)
        self.socket.send(_message(encode(1, greeting, encode_hello(prefill_hello()))))
        await self.heard()

    def place(self, body: bytes, start: int, size: int | None = None) -> None:
        """Say that `body` lies at `start`."""
        header, _ = encode(2, CHUNK, body)
        place = _PLACE.pack(len(header), start, len(body) if size is None else size)
        self.socket.send(place + header)

    def close(self) -> None:
        self.socket.close()
        os.close(self.descriptor)


@contextmanager
def rogue(**options: int) -> Iterator[Rogue]:
    made = Rogue(**options)
    try:
        yield made
    finally:
        made.close()


async def test_a_body_goes_through_memory_and_never_through_the_socket(side: Side) -> None:
    link = await side.opened()
    seen: list[int] = []
    take = side.receiver.take
    (guest,) = side.host._guests.values()
    received = guest.port._received
    guest.port._received = lambda message: (seen.append(len(message)), received(message))[1]
    side.receiver.take = take  # type: ignore[method-assign]
    body = os.urandom(300_000)
    assert await link.send(CHUNK, len(body), put(body)) == digest_of(body)
    assert bytes(side.stage.arrived[0].body) == body
    assert max(seen) < 300


async def test_what_arrived_is_out_of_the_senders_reach(side: Side) -> None:
    link = await side.opened()
    side.stage.silent = True
    rooms: list[memoryview] = []

    def fill(room: memoryview) -> None:
        room[:] = b"good"
        rooms.append(room)

    sending = asyncio.create_task(link.send(CHUNK, 4, fill))
    while not side.stage.arrived:
        await asyncio.sleep(0)
    rooms[0][:] = b"evil"
    assert bytes(side.stage.arrived[0].body) == b"good"
    side.stage.arrived[0].reply(Ack(), "")
    await sending


async def test_memory_written_too_early_is_a_damaged_frame_and_never_a_written_page() -> None:
    """A stale sender fills a region for the next chunk before the last one was copied out."""
    decode_side = DecodeSide()
    host = SharedMemoryHost(decode_side.receiver)
    host.start(DECODE_PEER)
    landing = decode_side.landings.promise(request("r", 5), 1, 0.0)
    address = Address(landing.id, landing.generation, DECODE_PEER.incarnation, 1)
    box = Box(range(2), range(2), range(5))
    body = bytes(range(256))[: decode_side.cache.token_bytes(box.layers) * 5]
    body = body.ljust(decode_side.cache.token_bytes(box.layers) * 5, b".")
    wire = SharedMemoryWire(DECODE_PEER, 1 << 20)
    link = FramedLink(wire, prefill_hello(), DECODE_PEER, rooms=wire)
    await link.open()

    def spoil(digest: int) -> None:
        (start, _), *_ = wire._rooms.values()
        assert wire._memory is not None
        wire._memory[start : start + 8] = b"the next"

    chunk = Chunk(address, 0, box, "float32")
    with pytest.raises(Exception, match="damaged 3 times"):
        await link.send(chunk, len(body), put(body), spoil)
    slots = slice(0, 20)
    assert not any(decode_side.cache.keys(layer)[slots].any() for layer in range(2))
    assert decode_side.receiver.counters["damaged"] == 3
    await link.send(chunk, len(body), put(body))
    assert decode_side.cache.keys(0)[slots].any()
    link.close()
    host.close()


@pytest.mark.parametrize(
    ("start", "size"),
    [
        (1 << 16, 4),
        ((1 << 16) - 3, 4),
        (2**64 - 2, 4),
        (2**64 - 4, 4),
        (0, 2**64 - 1),
        (0, 17 << 20),
    ],
)
async def test_a_place_outside_the_memory_is_a_bad_frame(side: Side, start: int, size: int) -> None:
    with rogue() as sender:
        await sender.greet()
        sender.place(b"evil", start, size)
        while not side.receiver.counters["bad_frames"]:
            await asyncio.sleep(0)
        assert side.stage.arrived == []
        sender.place(b"\0\0\0\0", 0)  # the link lives: nine more before it is cut
        while not side.stage.arrived:
            await asyncio.sleep(0)


async def test_memory_comes_back_when_a_cancel_and_the_answer_come_in_one_breath(
    side: Side,
) -> None:
    link = await side.opened()
    side.stage.silent = True
    sending = asyncio.create_task(link.send(CHUNK, 1, put(b"x")))
    while not side.stage.arrived:
        await asyncio.sleep(0)
    sending.cancel()  # it is told at the loop's next turn
    [serial] = link._asked
    link._received(list(encode(serial, Ack())))
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert isinstance(link._wire, SharedMemoryWire) and link._wire._ring.taken == 0


async def test_an_answer_that_is_none_loses_the_link_at_once(side: Side) -> None:
    link = await side.opened()
    side.stage.silent = True
    sending = asyncio.create_task(link.send(CHUNK, 1, put(b"x")))
    while not side.stage.arrived:
        await asyncio.sleep(0)
    (guest,) = side.host._guests.values()
    guest.port.send(b"short")
    with pytest.raises(WorkerLost, match="unreadable"):
        await sending


async def test_without_anybody_near_no_failure_is_left_unheard(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What nobody had awaited when it failed, asyncio logs as an error: one for each link."""
    wire = SharedMemoryWire(DECODE_PEER)
    with pytest.raises(WorkerLost):
        await wire.open(lambda parts: None, lambda reason: None)
    wire.close()
    del wire
    gc.collect()
    assert not caplog.records


async def test_another_length_than_the_headers_is_a_damaged_body(side: Side) -> None:
    with rogue() as sender:
        await sender.greet()
        sender.place(b"\0\0\0\0", 0, 3)
        answer = await sender.heard()
        length, _, _ = _PLACE.unpack_from(answer)
        header = answer[_PLACE.size : _PLACE.size + length]
        assert type(decode([header, b""]).fields).__name__ == "Nack"
        assert side.stage.arrived == []


async def test_junk_is_counted_and_harms_nobody(side: Side) -> None:
    with rogue() as sender:
        await sender.greet()
        for junk in (
            b"x",
            b"x" * 17,
            _PLACE.pack(9, 0, 0),
            _PLACE.pack(0, 2**64 - 1, 0) + b"y" * 99,
        ):
            sender.socket.send(junk)
        while side.receiver.counters["bad_frames"] < 4:
            await asyncio.sleep(0)
    link = await side.opened()
    await link.send(CHUNK, 1, put(b"x"))


async def test_memory_that_could_shrink_under_the_reader_is_not_mapped(side: Side) -> None:
    with rogue(seals=0) as sender:
        sender.offer()
        assert await sender.heard() == b""


async def test_what_is_no_memory_is_not_mapped(side: Side, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    for mode in ("file", "none", "two", "words", "empty", "huge"):
        sender = Rogue(size=1 << 31 if mode == "huge" else 1 << 12)
        empty = os.memfd_create("empty", os.MFD_ALLOW_SEALING)
        fcntl.fcntl(empty, fcntl.F_ADD_SEALS, SEALS)
        with path.open("rb") as file:
            match mode:
                case "file":
                    sender.offer(file.fileno())
                case "none":
                    sender.socket.send(b"ring")
                case "two":
                    sender.offer(sender.descriptor, sender.descriptor)
                case "words":
                    sender.offer(message=b"rings")
                case "empty":
                    sender.offer(empty)
                case "huge":
                    sender.offer()
            assert await sender.heard() == b"", mode
        os.close(empty)
        sender.close()
    assert len(side.host) == 0


async def test_another_users_process_is_shown_the_door(
    side: Side, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Abstract names are open to all: what counts is what the kernel says of who connected."""
    monkeypatch.setattr(unix, "_CREDENTIALS", Shown(4242))
    wire = SharedMemoryWire(DECODE_PEER)
    with pytest.raises(WorkerLost, match="its user is 4242, not"):
        await wire.open(lambda parts: None, lambda reason: None)
    for _ in range(2):
        with rogue() as sender:
            assert await sender.heard() == b""
    assert len(side.host) == 0
    told = dict(side.receiver.metrics())
    assert told[metrics.labelled(metrics.LINKS_ENDED, reason="other_user")] >= 2
    assert len([r for r in caplog.records if "its user is 4242" in r.getMessage()]) == 1
    monkeypatch.undo()
    link = await side.opened()
    await link.send(CHUNK, 1, put(b"x"))


async def test_nobody_listening_is_a_lost_worker_at_once() -> None:
    wire = SharedMemoryWire(DECODE_PEER)
    with pytest.raises(WorkerLost, match="no shared memory"):
        await wire.open(lambda parts: None, lambda reason: None)
    wire.close()


async def test_a_listener_that_never_speaks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "READY_S", 0.01)
    with new_socket() as listener:
        listener.bind(name_of(KIND, DECODE_PEER))
        listener.listen()
        wire = SharedMemoryWire(DECODE_PEER)
        with pytest.raises(WorkerLost, match="no shared memory: the peer is silent"):
            await wire.open(lambda parts: None, lambda reason: None)
        wire.close()


@contextmanager
def no_descriptors() -> Iterator[None]:
    """As if this process had used up all it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry) for entry in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert used >= 3
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_no_descriptor_for_the_memory_is_a_lost_worker_and_leaks_nothing(
    side: Side,
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    wire = SharedMemoryWire(DECODE_PEER)
    with no_descriptors(), pytest.raises(WorkerLost, match="Too many open files"):
        await wire.open(lambda parts: None, lambda reason: None)
    wire.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_host_without_descriptors_accepts_later(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "RETRY_S", 0.001)
    with new_socket() as early:
        early.connect(name_of(KIND, DECODE_PEER))
        with no_descriptors():
            side.host._accept()
        assert len(side.host) == 0
        while len(side.host) == 0:
            await asyncio.sleep(0)


async def test_guests_are_counted_and_the_next_one_is_turned_away(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "MAX_GUESTS", 1)
    await side.opened()
    with rogue() as second:
        assert await second.heard() == b""
    assert len(side.host) == 1


async def test_without_shared_memory_the_same_link_goes_over_zeromq(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "memfd_create", None)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    far = ZmqHost(context, side.receiver)
    far.start()

    def refuse(*arguments: object) -> int:
        raise OSError("no memory")

    monkeypatch.setattr(os, "memfd_create", refuse)
    link = link_to(context, far.address, prefill_hello(), DECODE_PEER)
    await link.open()
    body = os.urandom(100_000)
    assert await link.send(CHUNK, len(body), put(body)) == digest_of(body)
    link.close()
    far.close()
    context.term()


async def test_more_than_the_memory_holds_waits_for_answers(side: Side) -> None:
    link = await side.opened(ring_bytes=1 << 12)
    side.stage.silent = True
    sends = [asyncio.create_task(link.send(CHUNK, 1 << 10, put(bytes(1 << 10)))) for _ in range(20)]
    for done in range(20):
        while len(side.stage.arrived) == done:
            await asyncio.sleep(0)
        assert len(side.stage.arrived) - done <= 4
        side.stage.arrived[done].reply(Ack(), "")
    await asyncio.gather(*sends)


async def test_who_waits_for_memory_is_told_that_the_link_is_lost(side: Side) -> None:
    link = await side.opened(ring_bytes=1 << 12)
    side.stage.silent = True
    sends = [asyncio.create_task(link.send(CHUNK, 1 << 12, put(bytes(1 << 12)))) for _ in range(3)]
    while not side.stage.arrived:
        await asyncio.sleep(0)
    side.host.close()
    results = await asyncio.gather(*sends, return_exceptions=True)
    assert [type(result) for result in results] == [WorkerLost] * 3


async def test_a_short_stop_ends_nothing(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = near.LOOKS - 1
    looks = [*([True] * longest + [False]) * 3, *[True] * near.LOOKS]
    seen: list[bool] = []

    def look(pid: int) -> bool:
        seen.append(looks[len(seen)])
        return seen[-1]

    monkeypatch.setattr(near, "LOOK_S", 0.0)
    monkeypatch.setattr(near, "stopped", look)
    link = await side.opened()
    while not link.lost:
        await asyncio.sleep(0)
    assert seen == looks


SERVE = """
import asyncio
from kvtransfer.receiver import Receiver
from kvtransfer.shared_memory import SharedMemoryHost
from tests.kvtransfer.fakes import DECODE_PEER, hello

async def main():
    host = SharedMemoryHost(Receiver(hello(), lambda arrived: None, lambda f, *a: f(*a)))
    host.start(DECODE_PEER)
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

SEND = """
import asyncio
from kvtransfer.frames import Address, Box, Chunk
from kvtransfer.link import FramedLink
from kvtransfer.shared_memory import SharedMemoryWire
from tests.kvtransfer.fakes import DECODE_PEER, prefill_hello

CHUNK = Chunk(Address("ab" * 16, 1, 22, 1), 0, Box(range(1), range(1), range(1)), "float32")

def half(room):
    room[: len(room) // 2] = bytes(len(room) // 2)
    print("half", flush=True)
    input()

async def main():
    wire = SharedMemoryWire(DECODE_PEER)
    link = FramedLink(wire, prefill_hello(), DECODE_PEER, rooms=wire)
    await link.open()
    await link.send(CHUNK, 1 << 20, half)

asyncio.run(main())
"""


@contextmanager
def left_behind() -> Iterator[None]:
    """Nothing of ours that has a name outlives the processes that used it."""
    before = set(Path("/dev/shm").iterdir())
    yield
    assert set(Path("/dev/shm").iterdir()) <= before
    assert f"@baton/{KIND}/{DECODE_PEER.incarnation:016x}" not in Path("/proc/net/unix").read_text()


def mapped() -> list[str]:
    """Senders' memory that this process can read."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if "baton-kv" in line and " r--s " in line]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_receiver_that_dies_or_stops_loses_the_link(how: signal.Signals) -> None:
    with left_behind():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SERVE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            await process.stdout.readline()
            wire = SharedMemoryWire(DECODE_PEER)
            link = FramedLink(wire, prefill_hello(), DECODE_PEER, rooms=wire, answer_timeout=60.0)
            await link.open()
            sending = asyncio.create_task(link.send(CHUNK, 1, put(b"x")))
            await asyncio.sleep(0)
            process.send_signal(how)
            with pytest.raises(WorkerLost, match="connection lost"):
                await sending
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            process._transport.close()  # type: ignore[attr-defined]


async def test_a_sender_killed_while_it_writes_leaves_nothing() -> None:
    with left_behind():
        side = Side()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SEND, stdin=-1, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"half\n"
        assert len(side.host) == len(mapped()) == 1
        process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]
        while len(side.host):
            await asyncio.sleep(0)
        assert side.stage.arrived == []
        side.close()
        assert not mapped()


def test_buffers_of_messages_are_joined_whatever_they_are() -> None:
    parts: tuple[Buffer, Buffer] = (b"head", memoryview(b"body"))
    assert _message(parts)[_PLACE.size :] == b"headbody"
    assert _message(parts, 7)[_PLACE.size :] == b"head"
