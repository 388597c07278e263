"""A gateway's gRPC server over fakes, and a client's channel to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster import rpc
from cluster.wire import inference_pb2 as wire
from gateway import inference
from gateway.gateway import Gateway
from tests.gateway.fakes import MODEL, FakePools, FakeSequencer, make_gateway, says


class Line:
    """The methods as a client calls them, and what is behind them."""

    def __init__(self, gateway: Gateway, channel: grpc.aio.Channel, port: int) -> None:
        self.gateway = gateway
        self.port = port
        self.channel = channel
        path = f"/{inference.SERVICE}/"
        self.raw = channel.unary_unary(path + "Generate")
        self.generate = channel.unary_unary(
            path + "Generate",
            request_serializer=wire.GenerateRequest.SerializeToString,
            response_deserializer=wire.GenerateResponse.FromString,
        )
        self.stream = channel.unary_stream(
            path + "GenerateStream",
            request_serializer=wire.GenerateRequest.SerializeToString,
            response_deserializer=wire.GenerateResponse.FromString,
        )

    @property
    def sequencer(self) -> FakeSequencer:
        assert isinstance(self.gateway.sequencer, FakeSequencer)
        return self.gateway.sequencer

    @property
    def pools(self) -> FakePools:
        assert isinstance(self.gateway.pools, FakePools)
        return self.gateway.pools


@asynccontextmanager
async def line_to(directory: Path) -> AsyncIterator[Line]:
    """Served with the options of the real server."""
    gateway = make_gateway(directory, FakeSequencer(says("Hi")), wall_clock=lambda: 123.9)
    gateway.text.start()
    server = rpc.new_server()
    inference.add_to_server(server, gateway)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Line(gateway, channel, port)
    await server.stop(None)
    gateway.text.stop()


def ask(**fields: Any) -> wire.GenerateRequest:
    fields.setdefault("model", MODEL)
    if not {"messages", "prompt_token_ids"} & fields.keys():
        fields.setdefault("prompt", "Q")
    return wire.GenerateRequest(**fields)


def conversation(*texts: str) -> wire.Messages:
    return wire.Messages(messages=[wire.Message(role="user", content=text) for text in texts])


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value
