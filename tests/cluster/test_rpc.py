"""Who may call what, over real connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from cluster import rpc
from cluster.credentials import Credentials
from cluster.errors import HandshakeRefused, StartError
from tests.credentials import made

ECHO = "/baton.Test/Echo"


class Worker:
    """The worker's side: one port as `credentials` say and one for everybody."""

    def __init__(self, credentials: Credentials | None) -> None:
        self.calls = 0
        self.server = rpc.new_server()
        handler = rpc.stream_handler(ECHO, self.echo, bytes, bytes, credentials)
        self.server.add_generic_rpc_handlers((handler,))
        secure = rpc.mutual_tls(credentials)
        inner = rpc.listen(self.server, "127.0.0.1:0", "--port", secure)
        self.address = f"127.0.0.1:{inner}"
        self.open_address = f"127.0.0.1:{rpc.listen(self.server, '127.0.0.1:0', '--port')}"

    async def echo(self, messages: AsyncIterator[bytes], _: object) -> AsyncGenerator[bytes, None]:
        self.calls += 1
        async for message in messages:
            yield message


async def ask(channel: grpc.aio.Channel) -> bytes:
    async def said() -> AsyncIterator[bytes]:
        yield b"hello"

    async with channel:
        answers = [answer async for answer in channel.stream_stream(ECHO)(said(), timeout=20.0)]
    return b"".join(answers)


async def refused(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel)
    return caught.value


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Credentials, Credentials]:
    return made(tmp_path / "ours")


@pytest.fixture
async def worker(keys: tuple[Credentials, Credentials]) -> AsyncIterator[Worker]:
    worker = Worker(keys[1])
    await worker.server.start()
    yield worker
    await worker.server.stop(None)


async def test_a_gateway_of_the_cluster_is_served(
    worker: Worker, keys: tuple[Credentials, Credentials]
) -> None:
    assert await ask(rpc.open_channel(worker.address, keys[0])) == b"hello"


async def test_nobody_else_gets_as_far_as_a_call(
    worker: Worker, keys: tuple[Credentials, Credentials], tmp_path: Path
) -> None:
    """G13. Each of them would be let in if one side's check were left out."""
    gateway, other = keys[0], made(tmp_path / "theirs")[0]
    borrowed = replace(other, authority=gateway.authority)  # trusts us, shows theirs
    for intruder in (other, borrowed, None):
        error = await refused(rpc.open_channel(worker.address, intruder))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "compare --keys" in rpc.why_not(error)
    nameless = grpc.ssl_channel_credentials(gateway.authority)
    options = (("grpc.ssl_target_name_override", gateway.peer),)
    error = await refused(grpc.aio.secure_channel(worker.address, nameless, options))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert worker.calls == 0


async def test_a_worker_is_no_gateway(
    worker: Worker, keys: tuple[Credentials, Credentials]
) -> None:
    """Its certificate is of the cluster, but not of the role that may give orders."""

    class Posing(Credentials):
        peer = keys[0].peer  # expects a worker, as only gateways do

    mine = keys[1]
    posing = Posing(mine.role, mine.authority, mine.certificate, mine.key)
    error = await refused(rpc.open_channel(worker.address, posing))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert worker.calls == 0


async def test_a_refusal_waits_for_what_the_caller_is_writing(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off while it writes, a caller would be told INTERNAL."""
    monkeypatch.setattr(rpc, "OPENING_S", 1000.0)
    gate = asyncio.Event()

    async def said() -> AsyncIterator[bytes]:
        await gate.wait()
        yield b"hello"

    async with rpc.open_channel(worker.open_address) as channel:
        call = channel.stream_stream(ECHO)(said(), timeout=20.0)
        await call.wait_for_connection()
        refusal = asyncio.create_task(call.code())
        assert await asyncio.wait({refusal}, timeout=0.1) == (set(), {refusal})
        gate.set()
        assert await refusal is grpc.StatusCode.UNAUTHENTICATED
        gate.clear()
        monkeypatch.setattr(rpc, "OPENING_S", 0.1)
        mute = channel.stream_stream(ECHO)(said(), timeout=20.0)
        assert await mute.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_another_role_does_not_answer_for_the_one_that_was_called(
    worker: Worker, keys: tuple[Credentials, Credentials]
) -> None:
    """Who holds a worker's key could otherwise take a gateway's place."""
    error = await refused(rpc.open_channel(worker.address, keys[1]))
    assert "no certificate of our keys" in rpc.why_not(error)


async def test_a_port_for_everybody_shows_nothing_of_it(worker: Worker) -> None:
    """Both ports are one server's: the check goes with the method, not with the port."""
    error = await refused(rpc.open_channel(worker.open_address))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert worker.calls == 0


async def test_without_keys_on_both_sides_all_is_open() -> None:
    worker = Worker(None)
    await worker.server.start()
    assert await ask(rpc.open_channel(worker.address)) == b"hello"
    await worker.server.stop(None)


async def test_keys_are_not_shown_to_who_has_none(keys: tuple[Credentials, Credentials]) -> None:
    worker = Worker(None)
    await worker.server.start()
    error = await refused(rpc.open_channel(worker.address, keys[0]))
    assert "no certificate of our keys" in rpc.why_not(error)
    await worker.server.stop(None)


async def test_that_nobody_is_there_needs_no_attention() -> None:
    error = await refused(rpc.open_channel("127.0.0.1:1"))
    assert rpc.why_not(error) == ""


async def test_a_taken_port_is_named(worker: Worker, keys: tuple[Credentials, Credentials]) -> None:
    for secure in (None, rpc.mutual_tls(keys[1])):
        with pytest.raises(StartError, match=f"{worker.address}: choose another --somewhere"):
            rpc.listen(rpc.new_server(), worker.address, "--somewhere", secure)


async def test_clients_get_tls_without_a_certificate_of_their_own(
    keys: tuple[Credentials, Credentials], tmp_path: Path
) -> None:
    files = (str(tmp_path / "ours" / name) for name in ("gateway.pem", "gateway.key"))
    server = rpc.new_server()
    handler = rpc.stream_handler(ECHO, Worker(None).echo, bytes, bytes)
    server.add_generic_rpc_handlers((handler,))
    port = rpc.listen(server, "127.0.0.1:0", "--grpc-port", rpc.server_tls(*files))
    await server.start()
    trust = grpc.ssl_channel_credentials(keys[0].authority)
    assert await ask(grpc.aio.secure_channel(f"localhost:{port}", trust)) == b"hello"
    await refused(rpc.open_channel(f"127.0.0.1:{port}"))
    await server.stop(None)


@pytest.mark.parametrize("key", ["nowhere.key", "worker.key"])
def test_a_certificate_that_cannot_be_used_is_named(
    keys: tuple[Credentials, Credentials], tmp_path: Path, key: str
) -> None:
    certificate = str(tmp_path / "ours" / "gateway.pem")
    with pytest.raises(StartError, match=f"--ssl-certfile .*gateway.pem, --ssl-keyfile .*{key}: "):
        rpc.server_tls(certificate, str(tmp_path / "ours" / key))
    assert rpc.server_tls("", "") is None


# What a caller says and how many there may be.


def number(data: bytes) -> bytes:
    return b"%d" % int(data)


async def said(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def test_what_cannot_be_read_ends_the_call_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """G1. What was said before it counts, and what comes after it is another call's."""
    server = rpc.new_server()
    closed = asyncio.Event()

    async def echo(messages: AsyncIterator[bytes], _: object) -> AsyncGenerator[bytes, None]:
        try:
            async for message in messages:
                yield message
        finally:
            closed.set()

    server.add_generic_rpc_handlers((rpc.stream_handler(ECHO, echo, number, bytes),))
    port = rpc.listen(server, "127.0.0.1:0", "--port")
    await server.start()
    async with rpc.open_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(ECHO)(said(b"1", b"x", b"2"), timeout=20.0)
        assert await call.read() == b"1"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert closed.is_set()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        again = channel.stream_stream(ECHO)(said(b"3"), timeout=20.0)
        assert [answer async for answer in again] == [b"3"]
    await server.stop(None)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (record.message, record.exc_info) == ("call refused", None)


async def test_a_refusal_is_a_status(caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(messages: AsyncIterator[bytes], _: object) -> AsyncGenerator[bytes, None]:
        async for _ in messages:
            raise HandshakeRefused("theirs is 2, ours is 1")
        yield b""

    server = rpc.new_server()
    server.add_generic_rpc_handlers((rpc.stream_handler(ECHO, refuse, bytes, bytes),))
    port = rpc.listen(server, "127.0.0.1:0", "--port")
    await server.start()
    error = await refused(rpc.open_channel(f"127.0.0.1:{port}"))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details() == "theirs is 2, ours is 1"
    await server.stop(None)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("tls", [False, True])
async def test_more_connections_than_there_may_be(
    keys: tuple[Credentials, Credentials], tls: bool
) -> None:
    """Who says nothing, or has not shaken hands, counts; each port has a count of its own."""
    server = rpc.new_server(2)
    handler = rpc.stream_handler(ECHO, Worker(None).echo, bytes, bytes)
    server.add_generic_rpc_handlers((handler,))
    port = rpc.listen(server, "127.0.0.1:0", "--port", rpc.mutual_tls(keys[1] if tls else None))
    other = rpc.listen(server, "127.0.0.1:0", "--port")
    await server.start()
    held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        writer.close()
        assert await ask(rpc.open_channel(f"127.0.0.1:{other}")) == b"hello"
        held.pop()[1].close()
        channel = rpc.open_channel(f"127.0.0.1:{port}", keys[0] if tls else None)
        async with channel:
            call = channel.stream_stream(ECHO)(said(b"hello"), timeout=20.0, wait_for_ready=True)
            assert [answer async for answer in call] == [b"hello"]
    held.pop()[1].close()
    await server.stop(None)
