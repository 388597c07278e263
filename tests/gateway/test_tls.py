"""The gateway's ports with keys and with a certificate: who is served where."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc
import pytest

from cluster import rpc
from cluster.config import GatewayConfig
from cluster.credentials import WORKER, Credentials, credentials_for
from cluster.messages import Hello, Load
from cluster.wire import codec
from cluster.wire import inference_pb2 as wire
from deploy.keys import make
from gateway import main
from tests.cluster.test_worker import HELLO
from tests.gateway.fakes import MODEL, FakePools, FakeSequencer, make_gateway, says
from tests.gateway.test_main import free_ports


class Pools(FakePools):
    """Writes down who joined."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: list[Hello] = []

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass


class Process:
    """One gateway with everything: keys for workers, a certificate for clients."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = tmp_path / "keys"
        make(keys)
        worker = credentials_for(WORKER, str(keys))
        assert worker is not None
        self.worker: Credentials = worker
        self.trust = ssl.create_default_context(cafile=str(keys / "ca.pem"))
        self.authority = worker.authority
        self.pools = Pools()
        gateway = make_gateway(tmp_path, FakeSequencer(says("abc")), pools=self.pools)
        monkeypatch.setattr(main, "build", lambda *_: (gateway, self.pools))
        monkeypatch.setattr(main, "serve_membership", self._membership)
        self.http, self.grpc, self.join = free_ports(3)
        config = GatewayConfig(
            port=self.http,
            grpc_port=self.grpc,
            join_port=self.join,
            keys=str(keys),
            ssl_certfile=str(keys / "gateway.pem"),
            ssl_keyfile=str(keys / "gateway.key"),
        )
        self.stopping = asyncio.Event()
        self.serving = asyncio.create_task(main.serve(config, self.stopping))

    async def _membership(
        self, pools: Pools, messages: AsyncIterator[Hello | Load], name: str
    ) -> AsyncIterator[str]:
        async for message in messages:
            assert isinstance(message, Hello)
            pools.joined.append(message)
            yield name
            return

    async def up(self) -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.http)
            except ConnectionRefusedError:
                await asyncio.sleep(0)
            else:
                writer.close()
                await writer.wait_closed()
                return

    async def joined(self, channel: grpc.aio.Channel) -> str:
        async def hello() -> AsyncIterator[Hello]:
            yield HELLO

        async with channel:
            call = channel.stream_stream(
                codec.JOIN,
                request_serializer=codec.encode_membership,
                response_deserializer=codec.decode_welcome,
            )
            return "".join([welcome async for welcome in call(hello(), timeout=20.0)])


@pytest.fixture
async def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Process]:
    process = Process(tmp_path, monkeypatch)
    await process.up()
    yield process
    process.stopping.set()
    await process.serving


async def test_clients_get_tls_at_both_doors(process: Process) -> None:
    body = {"model": MODEL, "prompt": "Q", "max_tokens": 9, "stream": True}
    async with aiohttp.ClientSession() as http:
        url = f"https://localhost:{process.http}/v1/completions"
        async with http.post(url, json=body, ssl=process.trust) as answer:
            assert answer.status == 200
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        with pytest.raises(aiohttp.ClientError):
            await http.post(url.replace("https", "http"), json=body)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http.post(url, json=body)
    ask = wire.GenerateRequest(model=MODEL, prompt="Q", max_tokens=9).SerializeToString()
    trust = grpc.ssl_channel_credentials(process.authority)
    async with grpc.aio.secure_channel(f"localhost:{process.grpc}", trust) as channel:
        said = await channel.unary_unary("/baton.v1.Inference/Generate")(ask, timeout=20.0)
        assert wire.GenerateResponse.FromString(said).choices[0].text == "abc"


async def test_workers_join_with_a_certificate_and_at_their_own_port(process: Process) -> None:
    door = f"127.0.0.1:{process.join}"
    assert await process.joined(rpc.open_channel(door, process.worker)) == door
    assert process.pools.joined == [HELLO]


async def test_nobody_joins_without(process: Process) -> None:
    """Row G13: neither at the workers' port nor at the clients'."""
    trust = grpc.ssl_channel_credentials(process.authority)
    for channel, code in (
        (rpc.open_channel(f"127.0.0.1:{process.join}"), grpc.StatusCode.UNAVAILABLE),
        (
            grpc.aio.secure_channel(f"localhost:{process.join}", trust),
            grpc.StatusCode.UNAVAILABLE,
        ),
        (
            grpc.aio.secure_channel(f"localhost:{process.grpc}", trust),
            grpc.StatusCode.UNAUTHENTICATED,
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.joined(channel)
        assert caught.value.code() is code
    assert process.pools.joined == []
