"""What only real sockets and processes can show."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import zmq

from cluster import metrics
from cluster.errors import HandshakeRefused, StartError, WorkerLost
from kvtransfer.frames import MAX_BODY, Address, Box, Chunk, digest_of, encode
from kvtransfer.link import FramedLink
from kvtransfer.receiver import MAX_STRIKES, Receiver
from kvtransfer.zeromq import ZmqHost, ZmqWire
from tests.kvtransfer.fakes import DECODE_PEER, Yes, hello, prefill_hello, put

CHUNK = Chunk(
    Address("ab" * 16, 1, DECODE_PEER.incarnation, 1),
    0,
    Box(range(1), range(1), range(1)),
    "float32",
)
Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    context: Context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
async def host(context: Context) -> AsyncIterator[ZmqHost]:
    loop = asyncio.get_running_loop()
    host = ZmqHost(context, Receiver(hello(), Yes(), loop.call_soon_threadsafe))
    host.start()
    yield host
    host.close()


@pytest.fixture
def raw(context: Context) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER that follows no rules."""
    with context.socket(zmq.DEALER) as raw:
        yield raw


def link(context: Context, address: str, **options: float) -> FramedLink:
    return FramedLink(ZmqWire(context, address), prefill_hello(), DECODE_PEER, **options)


async def test_a_body_at_the_limit_arrives_whole(context: Context, host: ZmqHost) -> None:
    sender = link(context, host.address)
    await sender.open()
    body = os.urandom(1 << 20) * (MAX_BODY >> 20)
    assert await sender.send(CHUNK, len(body), put(body)) == digest_of(body)
    sender.close()


async def test_nobody_listening_is_a_lost_worker_at_once(context: Context, host: ZmqHost) -> None:
    host.close()
    sender = link(context, host.address, open_timeout=60.0)
    with pytest.raises(WorkerLost):
        await sender.open()


async def test_an_address_that_is_none_is_a_lost_worker(context: Context) -> None:
    with pytest.raises(WorkerLost, match="cannot connect"):
        await link(context, "tcp://nonsense").open()


async def test_a_listener_that_never_speaks_is_given_up(context: Context) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(WorkerLost, match=r"no handshake within 0\.1 s"):
            await link(context, address, open_timeout=0.1).open()


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:*", "tcp://*:5555", "tcp://192.0.2.1:1", "tcp://"])
async def test_only_loopback_is_listened_on(context: Context, bind: str) -> None:
    host = ZmqHost(context, Receiver(hello(), Yes(), lambda f, *a: f(*a)))
    with pytest.raises(StartError, match="loopback"):
        host.start(bind)


async def test_a_taken_port_is_named(context: Context, host: ZmqHost) -> None:
    other = ZmqHost(context, Receiver(hello(), Yes(), lambda f, *a: f(*a)))
    with pytest.raises(StartError, match=host.address):
        other.start(host.address)


async def test_junk_from_a_raw_socket_is_counted_and_cut(
    context: Context, host: ZmqHost, raw: zmq.Socket[bytes]
) -> None:
    raw.connect(host.address)
    for number in range(MAX_STRIKES + 5):
        raw.send_multipart([b"junk"] * (number % 4 + 1))
    counters = host._receiver.counters
    while counters["dropped"] < 5:
        await asyncio.sleep(0)
    assert counters["bad_frames"] == MAX_STRIKES
    sender = link(context, host.address)
    await sender.open()
    await sender.send(CHUNK, 1, put(b"x"))
    sender.close()
    told = dict(host.metrics())
    assert told[metrics.labelled(metrics.BAD_FRAMES, reason="malformed")] == MAX_STRIKES
    assert told[metrics.ANSWERS_UNDELIVERED] == 0


async def test_an_answer_to_nobody_is_counted(host: ZmqHost) -> None:
    host._receiver.take(b"nobody", list(encode(1, CHUNK, b"x")))
    assert dict(host.metrics())[metrics.ANSWERS_UNDELIVERED] == 1


async def test_an_oversized_message_costs_its_sender_the_connection_only(
    context: Context, host: ZmqHost, raw: zmq.Socket[bytes]
) -> None:
    monitor = raw.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    raw.connect(host.address)
    raw.send(bytes(MAX_BODY + 1))
    assert await asyncio.to_thread(monitor.poll, 10_000)
    monitor.close()
    sender = link(context, host.address)
    await sender.open()
    await sender.send(CHUNK, 1, put(b"x"))
    assert host._receiver.counters["bad_frames"] == 0
    sender.close()


SERVE = """
import asyncio, zmq
from kvtransfer.receiver import Receiver
from kvtransfer.zeromq import ZmqHost
from tests.kvtransfer.fakes import hello

async def main():
    host = ZmqHost(zmq.Context(), Receiver(hello(), lambda arrived: None, lambda f, *a: f(*a)))
    host.start()
    print(host.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_receiver_that_dies_or_stops_loses_the_link(
    context: Context, how: signal.Signals
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        address = (await process.stdout.readline()).decode().strip()
        sender = link(context, address, answer_timeout=60.0)
        await sender.open()
        sending = asyncio.create_task(sender.send(CHUNK, 1, put(b"x")))
        await asyncio.sleep(0)
        process.send_signal(how)
        with pytest.raises(WorkerLost, match="connection lost"):
            await sending
        with pytest.raises(WorkerLost):
            await sender.open()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def test_a_restarted_receiver_is_not_taken_for_the_old_one(
    context: Context, host: ZmqHost
) -> None:
    host._receiver.hello = replace(hello(), peer=replace(DECODE_PEER, incarnation=23))
    with pytest.raises(HandshakeRefused, match=f"incarnation {DECODE_PEER.incarnation} meets 23"):
        await link(context, host.address).open()
