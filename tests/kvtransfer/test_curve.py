"""Who gets a connection on the data plane when there are keys, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
import zmq

from cluster import metrics
from cluster.credentials import Credentials
from cluster.errors import StartError, WorkerLost
from kvtransfer import curve
from kvtransfer.curve import Doorkeeper
from kvtransfer.frames import MAX_BODY, Address, Box, Chunk, digest_of
from kvtransfer.link import FramedLink
from kvtransfer.receiver import Receiver
from kvtransfer.zeromq import ZmqHost, ZmqWire
from tests.credentials import made
from tests.kvtransfer.fakes import DECODE_PEER, Yes, hello, prefill_hello, put

CHUNK = Chunk(
    Address("ab" * 16, 1, DECODE_PEER.incarnation, 1),
    0,
    Box(range(1), range(1), range(1)),
    "float32",
)
Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return made(tmp_path_factory.mktemp("ours"))[1]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return made(tmp_path_factory.mktemp("theirs"))[1]


@pytest.fixture
def context() -> Iterator[Context]:
    """The sender's; ZeroMQ's questions go to whoever answers in the receiver's."""
    context: Context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
async def host(keys: Credentials) -> AsyncIterator[ZmqHost]:
    theirs: Context = zmq.Context()
    loop = asyncio.get_running_loop()
    host = ZmqHost(theirs, Receiver(hello(), Yes(), loop.call_soon_threadsafe), keys)
    host.start()
    yield host
    host.close()
    theirs.destroy(linger=0)


def link(context: Context, host: ZmqHost, keys: Credentials | None, seconds: float) -> FramedLink:
    wire = ZmqWire(context, host.address, keys)
    return FramedLink(wire, prefill_hello(), DECODE_PEER, open_timeout=seconds)


async def carries(context: Context, host: ZmqHost, keys: Credentials | None) -> None:
    sender = link(context, host, keys, 30.0)
    await sender.open()
    body = bytes(range(256)) * 4096
    assert await sender.send(CHUNK, len(body), put(body)) == digest_of(body)
    sender.close()


async def counted(host: ZmqHost, number: int) -> None:
    while host._receiver.counters["keyless"] < number:
        await asyncio.sleep(0.001)


async def test_who_shows_the_senders_key_is_let_in(
    context: Context, host: ZmqHost, keys: Credentials
) -> None:
    await carries(context, host, keys)
    assert host._receiver.counters["keyless"] == 0


async def test_a_body_at_the_limit_arrives_whole(
    context: Context, host: ZmqHost, keys: Credentials
) -> None:
    """Encrypted it is larger than the limit."""
    sender = link(context, host, keys, 30.0)
    await sender.open()
    body = bytes(range(256)) * (MAX_BODY >> 8)
    assert await sender.send(CHUNK, len(body), put(body)) == digest_of(body)
    sender.close()


@pytest.mark.parametrize("which", ["client key", "server key", "both"])
async def test_a_wrong_key_is_refused_at_once_and_counted(
    context: Context,
    host: ZmqHost,
    keys: Credentials,
    others: Credentials,
    which: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = {
        "client key": replace(keys, kv_sender=others.kv_sender),
        "server key": replace(keys, kv_receiver=others.kv_receiver),
        "both": others,
    }[which]
    for number in (1, 2):
        with pytest.raises(WorkerLost, match="compare --keys"):
            await link(context, host, wrong, 60.0).open()
        await counted(host, number)
    await carries(context, host, keys)
    told = dict(host.metrics())
    assert told[metrics.labelled(metrics.LINKS_ENDED, reason="keyless")] == 2
    assert len([r for r in caplog.records if "no key of ours" in r.getMessage()]) == 1


async def test_no_key_is_refused_and_counted(
    context: Context, host: ZmqHost, keys: Credentials
) -> None:
    sender = link(context, host, None, 60.0)
    with pytest.raises(WorkerLost):
        await sender.open()
    await counted(host, 1)
    await carries(context, host, keys)


async def test_keys_are_no_use_with_who_has_none(context: Context, keys: Credentials) -> None:
    """What stands at that address may be anybody's."""
    loop = asyncio.get_running_loop()
    impostor = ZmqHost(context, Receiver(hello(), Yes(), loop.call_soon_threadsafe))
    impostor.start()
    with pytest.raises(WorkerLost, match="compare --keys"):
        await link(context, impostor, keys, 60.0).open()
    impostor.close()


async def test_raw_connections_held_open_keep_nobody_out(
    context: Context, host: ZmqHost, keys: Credentials
) -> None:
    """CVE-2020-15166: they once did, before libzmq 4.3.3, each with one byte."""
    place = ("127.0.0.1", int(host.address.rpartition(":")[2]))
    held = [socket.create_connection(place) for _ in range(50)]
    for number, raw in enumerate(held):
        raw.sendall(b"\xff"[: number % 2])
    await carries(context, host, keys)
    for raw in held:
        raw.close()


async def test_without_an_answer_to_zeromqs_question_any_key_would_do(
    context: Context,
    host: ZmqHost,
    others: Credentials,
    keys: Credentials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That the tests above can fail: CURVE alone authenticates nobody."""
    monkeypatch.setattr(curve.Doorkeeper, "answer", _lets_all_in)
    await carries(context, host, replace(keys, kv_sender=others.kv_sender))


def _lets_all_in(self: Doorkeeper, parts: list[bytes]) -> list[bytes]:
    return [b"1.0", bytes(parts[1]), b"200", b"OK", b"", b""]


def test_only_the_senders_key_opens(keys: Credentials) -> None:
    doorkeeper = Doorkeeper(keys)
    known = doorkeeper._allowed
    question = [b"1.0", b"7", b"", b"10.0.0.7", b"", b"CURVE"]
    assert doorkeeper.answer([*question, known]) == [b"1.0", b"7", b"200", b"OK", b"", b""]
    for wrong in (
        [*question, known[:-1] + b"\0"],
        [*question, b""],
        question,
        [*question, known, known],
        [*question[:-1], b"NULL", known],
        [b"2.0", *question[1:], known],
    ):
        assert doorkeeper.answer(wrong)[:3] == [b"1.0", b"7", b"400"]


async def test_with_keys_it_may_listen_anywhere(keys: Credentials) -> None:
    context: Context = zmq.Context()
    host = ZmqHost(context, Receiver(hello(), Yes(), lambda f, *a: f(*a)), keys)
    host.start("tcp://0.0.0.0:*")
    assert host.address.startswith("tcp://0.0.0.0:")
    host.close()
    context.destroy(linger=0)


async def test_a_taken_port_leaves_nothing_behind(host: ZmqHost, keys: Credentials) -> None:
    context: Context = zmq.Context()
    other = ZmqHost(context, Receiver(hello(), Yes(), lambda f, *a: f(*a)), keys)
    with pytest.raises(StartError, match=host.address):
        other.start(host.address)
    await asyncio.to_thread(context.term)  # waits for every socket of the context to be closed


def test_an_old_library_is_not_trusted(keys: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    curve.check_library(keys)
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 2))
    with pytest.raises(StartError, match=r"4\.3\.3 is the oldest good"):
        curve.check_library(None)


def test_a_library_without_curve_is_enough_without_keys(
    keys: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq, "has", lambda what: what != "curve")
    curve.check_library(None)
    with pytest.raises(StartError, match="without CURVE"):
        curve.check_library(keys)
