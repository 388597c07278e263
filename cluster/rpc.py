"""gRPC with the options that Baton relies on, and streams of cluster.messages instead of stubs.

Source  gRPC core's keepalive guide; `grpc.http2.ping_timeout_ms` because a stopped peer is not
        noticed by keepalive_timeout_ms alone, and the ping limits because a default server answers
        one ping a second with GOAWAY.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

MAX_MESSAGE_BYTES = 4 << 20

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 500),
    ("grpc.http2.ping_timeout_ms", 500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
CHANNEL_OPTIONS = [*_KEEPALIVE, ("grpc.enable_http_proxy", 0)]
SERVER_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 250),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.so_reuseport", 0),
]

Behaviour = Callable[[AsyncIterator[Any], grpc.aio.ServicerContext], AsyncIterator[Any]]


def stream_handler(
    path: str,
    behaviour: Behaviour,
    decode: Callable[[bytes], Any],
    encode: Callable[[Any], bytes],
) -> grpc.GenericRpcHandler:
    """Serve one bidirectional method. `path` is "/package.Service/Method"."""
    _, service, method = path.split("/")
    handler = grpc.stream_stream_rpc_method_handler(
        behaviour, request_deserializer=decode, response_serializer=encode
    )
    return grpc.method_handlers_generic_handler(service, {method: handler})


def open_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def new_server() -> grpc.aio.Server:
    return grpc.aio.server(options=SERVER_OPTIONS)
