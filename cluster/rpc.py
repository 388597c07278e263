"""gRPC with the options that Baton relies on, and streams of cluster.messages instead of stubs.

With Credentials both sides of a connection show a certificate of their cluster: a gateway serves
workers only, a worker gateways only. Without, everything is open to this machine's users.

Source  gRPC core's keepalive guide; `grpc.http2.ping_timeout_ms` because a stopped peer is not
        noticed by keepalive_timeout_ms alone, and the ping limits because a default server answers
        one ping a second with GOAWAY; `grpc.max_allowed_incoming_connections` in grpc_types.h.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cluster.credentials import Credentials
from cluster.errors import BadRequest, BatonError, StartError

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 << 20

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 1000),
    # Beats decide sooner. This is for what they cannot see, and busy cores must not trip it.
    ("grpc.keepalive_timeout_ms", 4000),
    ("grpc.http2.ping_timeout_ms", 4000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
CHANNEL_OPTIONS = [*_KEEPALIVE, ("grpc.enable_http_proxy", 0)]
SERVER_OPTIONS = [
    *_KEEPALIVE,
    # A flood of pings is answered with GOAWAY. On a stream that only listens strikes never lapse,
    # and on busy cores honest pings come in pairs: with 10 strikes at 250 ms workers were lost.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10),
    ("grpc.http2.max_ping_strikes", 200),
    ("grpc.max_concurrent_streams", 128),  # of one connection; further calls wait at the client
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),
]

OPENING_S = 1.0
"""How long a caller without the right certificate may take over its first message. It is not looked
at, but grpc.aio tells a caller that is cut off while it writes INTERNAL instead of our status."""

Behaviour = Callable[[AsyncIterator[Any], grpc.aio.ServicerContext], AsyncGenerator[Any, None]]


def stream_handler(
    path: str,
    behaviour: Behaviour,
    decode: Callable[[bytes], Any],
    encode: Callable[[Any], bytes],
    credentials: Credentials | None = None,
) -> grpc.GenericRpcHandler:
    """Serve one bidirectional method. `path` is "/package.Service/Method".

    With credentials it is for callers of the other role alone, on whatever port they come. A
    BatonError ends the call with its status; `decode` raises ValueError or DecodeError.
    """
    _, service, method = path.split("/")

    async def serve(data: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        if credentials is not None and not _shown(credentials.peer, context):
            text = (
                f"this takes a certificate of {credentials.peer}: see --keys, --join, --join-port"
            )
            with suppress(TimeoutError, StopAsyncIteration):
                async with asyncio.timeout(OPENING_S):
                    await anext(aiter(data))
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)
        messages = _Messages(data, decode)
        failure: BatonError | None = None
        try:
            async with aclosing(behaviour(messages, context)) as answers:
                async for answer in answers:
                    await context.write(answer)
        except BatonError as error:
            failure = error
        if failure := messages.fault or failure:
            about = {"method": path, "peer": context.peer(), "reason": failure.message}
            log.warning("call refused", extra=about)
            await context.abort(grpc.StatusCode[failure.grpc], failure.message)

    handler = grpc.stream_stream_rpc_method_handler(serve, response_serializer=encode)
    return grpc.method_handlers_generic_handler(service, {method: handler})


class _Messages:
    """What a caller says, up to what cannot be read. gRPC, if it decoded, would answer that with
    INTERNAL and log a traceback each time."""

    def __init__(self, data: AsyncIterator[bytes], decode: Callable[[bytes], Any]) -> None:
        self.fault: BadRequest | None = None
        self._next = aiter(data).__anext__
        self._decode = decode

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> Any:
        data = await self._next()
        try:
            return self._decode(data)
        except (ValueError, DecodeError):
            self.fault = BadRequest("a message is not of this protocol", code="invalid_message")
        raise StopAsyncIteration


def _shown(name: str, context: grpc.aio.ServicerContext) -> bool:
    """Whether the caller has a certificate with this name."""
    return name.encode() in context.auth_context().get("x509_common_name", ())


def open_channel(address: str, credentials: Credentials | None = None) -> grpc.aio.Channel:
    """To a process of the other role, whatever its address is called."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(
            credentials.authority, credentials.key, credentials.certificate
        ),
        options=[*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", credentials.peer)],
    )


def new_server(max_connections: int = 0) -> grpc.aio.Server:
    """At most so many connections at each of its ports, any number if it is 0. One beyond that is
    closed before its handshake."""
    limit = [("grpc.max_allowed_incoming_connections", max_connections)] if max_connections else []
    return grpc.aio.server(options=[*SERVER_OPTIONS, *limit])


def mutual_tls(credentials: Credentials | None) -> grpc.ServerCredentials | None:
    """For a port that takes processes of the cluster and nobody else."""
    if credentials is None:
        return None
    pair = (credentials.key, credentials.certificate)
    return grpc.ssl_server_credentials([pair], credentials.authority, require_client_auth=True)


def server_tls(certificate: str, key: str) -> grpc.ServerCredentials | None:
    """For a port that takes anybody; None if there is no certificate's file. Raises StartError."""
    if not certificate:
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
    except OSError as error:  # what ssl raises is one too
        reason = error.strerror or error
        raise StartError(f"--ssl-certfile {certificate}, --ssl-keyfile {key}: {reason}") from None
    return grpc.ssl_server_credentials([pair])


def listen(
    server: grpc.aio.Server,
    address: str,
    flag: str,
    secure: grpc.ServerCredentials | None = None,
) -> int:
    """Add a port: its number. Raises StartError naming `flag`."""
    try:
        if secure is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, secure))
    except RuntimeError:
        raise StartError(f"cannot listen on {address}: choose another {flag}") from None


def why_not(error: grpc.aio.AioRpcError) -> str:
    """Why no connection came about, where somebody has to do something about it; else nothing."""
    details = error.details() or ""
    if "failed to connect" not in details:
        return ""
    if "handshake failed" in details or "Verification" in details:
        return "it shows no certificate of our keys: compare --keys of both"
    if "Socket closed" in details:
        return "it closes the connection at once: compare --keys of both"
    return ""
