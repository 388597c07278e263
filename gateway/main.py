"""`baton gateway`: puts the front, the pools and their two servers together and runs them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import logging
import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import grpc
import h11
import uvicorn

from cluster import digests, ports, process, rpc
from cluster.config import BUILT_IN, GatewayConfig, load, model_directory
from cluster.credentials import GATEWAY, Credentials, credentials_for
from cluster.errors import BadRequest, StartError
from cluster.metrics import GatewayMetrics
from cluster.model import config_digest, load_config
from cluster.pressure import Pressure
from cluster.wire import codec
from gateway import inference, share
from gateway.app import create_app
from gateway.ask import Limits
from gateway.connection import Connection, Crowd, watch_readers
from gateway.gateway import Gateway
from gateway.handshake import Handshake
from gateway.keys import Keys
from gateway.pools import Pools, serve_membership
from gateway.reattach import Kept
from gateway.scrape import Siblings
from gateway.sequencer import Sequencer
from gateway.session import over_grpc
from gateway.text import TextPool
from gateway.tokens import Tokenizer

log = logging.getLogger(__name__)

ACTIVE_POLL_S = 0.05

DEALT_S = 1.0
"""On a port that several share: how long calls still come by connections that were dealt to this
gateway before it stepped back."""

LAST_WORD_S = 1.0
"""For clients to be told that their answer is cut off. One that does not read is hung up on."""

LAST_GRACE_S = 0.2
"""For members to see that their session has ended, when no answer needs them any more."""


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop. Raises StartError."""
    config = load(GatewayConfig, argv, "baton gateway")
    process.die_with_parent(config.die_with)
    process.start_logging(config.log_level)
    gc.freeze()  # modules and schemas stay: looking through them would hold up every stream
    return process.run(lambda stopping: serve(config, stopping), config.start_word)


async def serve(config: GatewayConfig, stopping: asyncio.Event) -> int:
    """One gateway, from bound ports to the last answer. Raises StartError.

    Returns the exit status: 1 if it ended because a part of it broke.
    """
    if config.listen:
        listeners = [socket.socket(fileno=number) for number in config.listen]
    else:
        listeners = [ports.listen(config.host, config.port)]
    directory = model_directory(config)
    credentials = credentials_for(GATEWAY, config.keys)
    gateway, pools = build(config, directory, credentials)
    if config.sibling:
        own = "{}:{}".format(*listeners[-1].getsockname()[:2])
        number = config.sibling.index(own)
        gateway.siblings = Siblings(config.port, config.sibling, number, config.scheme)
        share.step_forward(listeners[0])
    server, http = _servers(config, gateway, pools, credentials)
    gateway.text.start()
    with contextlib.suppress(BadRequest):  # so that no chat has to wait for the template's process
        await gateway.text.run(gateway.tokenizer.render, [{"role": "user", "content": ""}])
    await server.start()
    serving, *others = parts = [
        asyncio.create_task(part)
        for part in (
            http.serve(sockets=listeners),
            pools.watch(),
            gateway.keys.follow(),
            gateway.pressure.watch(lambda: _hang_up_idle(http.connections)),
            watch_readers(http.connections, config.write_timeout),
        )
    ]
    stop = asyncio.create_task(stopping.wait())
    http_address = ports.address(config.host, config.port)
    log.info("gateway up", extra={"http": http_address, "grpc": config.grpc_address})
    await asyncio.wait((stop, *parts), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if gateway.siblings is not None:
        share.step_back(listeners[0], gateway.siblings.own, len(gateway.siblings.addresses))
        await asyncio.sleep(DEALT_S)
    await _drain(gateway, config.shutdown_timeout)
    http.hang_up()
    http.should_exit = True
    await asyncio.wait((serving,))
    for part in others:
        part.cancel()
    await gateway.kept.close()
    await pools.close()
    await server.stop(LAST_GRACE_S)
    gateway.text.stop()
    return await _verdict(*parts)


def _servers(
    config: GatewayConfig, gateway: Gateway, pools: Pools, credentials: Credentials | None
) -> tuple[grpc.aio.Server, _Uvicorn]:
    """For gRPC, with its ports, and for HTTP; neither serves yet. Raises StartError."""
    server = rpc.new_server(config.max_connections)
    server.add_generic_rpc_handlers((_registry(pools, config.join_address, credentials),))
    inference.add_to_server(server, gateway)
    secure = rpc.server_tls(config.ssl_certfile, config.ssl_keyfile)
    rpc.listen(server, config.grpc_address, "--grpc-port", secure)
    if credentials is not None:
        rpc.listen(server, config.join_address, "--join-port", rpc.mutual_tls(credentials))
    crowd = Crowd(
        config.max_connections, config.max_connections_per_peer, tell=gateway.metrics.error
    )
    http = uvicorn.Config(
        create_app(gateway),
        http=_protocol(config, crowd),
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=int(config.keep_alive_timeout),
        lifespan="off",
        log_config=None,
        log_level="error",  # it warns of whatever strangers send
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # nothing runs any more by then
    )
    return server, _Uvicorn(http)


async def _drain(gateway: Gateway, seconds: float) -> None:
    """Refuse new calls, let those that run come to their end, and tell it those that do not."""
    gateway.calls.drain()
    gateway.pools.drain()
    if not await _idle(gateway, seconds):
        gateway.calls.cut()
        await _idle(gateway, LAST_WORD_S)


async def _idle(gateway: Gateway, seconds: float) -> bool:
    """Whether no call is being answered, soon or within so many seconds."""
    now = asyncio.get_running_loop().time
    give_up = now() + seconds
    while gateway.active or gateway.kept.running:
        if now() >= give_up:
            return False
        await asyncio.sleep(ACTIVE_POLL_S)
    return True


async def _verdict(*parts: asyncio.Task[None]) -> int:
    status = 0
    for ended in await asyncio.gather(*parts, return_exceptions=True):
        if isinstance(ended, Exception):
            log.critical("gateway broke", exc_info=ended)
            status = 1
    return status


def build(
    config: GatewayConfig, directory: Path, credentials: Credentials | None = None
) -> tuple[Gateway, Pools]:
    """Everything but the servers. Raises BadModel."""
    digests.verify(directory, weights=False, skip=config.skip_digest)
    model = load_config(directory)
    tokenizer = Tokenizer.from_dir(directory)
    own_name = "baton-tiny" if directory == BUILT_IN else directory.resolve().name
    names = config.served_model_name or (own_name,)
    longest = config.max_model_len or model.max_model_len
    if longest > model.max_model_len:
        raise StartError(f"--max-model-len {longest}: the model ends at {model.max_model_len}")
    call = functools.partial(over_grpc, credentials=credentials)
    pools = Pools(names[0], config_digest(directory), call)
    metrics = GatewayMetrics(names[0], longest, pools.views)
    sequencer = Sequencer(
        pools,
        handed=metrics.handoff,
        recovered=lambda loss: metrics.recovery(loss.phase, loss.cause, loss.seconds),
        fell_back=metrics.fallback,
        max_waiting=config.max_waiting,
        max_queue_delay=config.max_queue_delay,
        queue_timeout=config.queue_timeout,
        no_worker_timeout=config.no_worker_timeout,
    )
    metrics.queue(lambda: sequencer.waiting, lambda: sequencer.held_back, sequencer.delay)
    stated = dataclasses.asdict(model.generation)
    defaults = {name: value for name, value in stated.items() if value is not None}
    gateway = Gateway(
        limits=Limits(
            model_names=names,
            vocab_size=model.vocab_size,
            max_model_len=longest,
            max_prompt_tokens=longest - 1,
            allow_unknown_fields=config.allow_unknown_fields,
        ),
        eos_ids=model.eos_ids,
        tokenizer=tokenizer,
        text=TextPool(tokenizer),
        sequencer=sequencer,
        pools=pools,
        keys=Keys(config.api_key, Path(config.api_key_file) if config.api_key_file else None),
        metrics=metrics,
        defaults=defaults,
        version=_version(),
        created=int(time.time()),
        request_timeout_s=config.request_timeout,
        write_timeout_s=config.write_timeout,
        kept=Kept(config.reattach_timeout),
        pressure=Pressure(config.pressure_limit, metrics.pressure),
    )
    return gateway, pools


def _protocol(config: GatewayConfig, crowd: Crowd) -> Any:
    """What uvicorn makes one of for each connection."""
    if not config.ssl_certfile:
        return functools.partial(Connection, crowd=crowd)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    return functools.partial(Handshake, context=context, crowd=crowd)


def _registry(pools: Pools, name: str, credentials: Credentials | None) -> grpc.GenericRpcHandler:
    return rpc.stream_handler(
        codec.JOIN,
        lambda messages, _: serve_membership(pools, messages, name),
        codec.decode_membership,
        codec.encode_welcome,
        credentials,
    )


def _version() -> str:
    try:
        return version("baton-serve")
    except PackageNotFoundError:
        return "0+source"


def _hang_up_idle(connections: Iterable[Any]) -> None:
    """Ask for no more requests on any, which ends those without one at once."""
    for connection in list(connections):
        with contextlib.suppress(h11.LocalProtocolError):  # it is ending already
            connection.shutdown()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: this process has one place for signals."""

    @property
    def connections(self) -> set[Connection]:
        """Those that are open now; the set itself, not a copy."""
        return cast("set[Connection]", self.server_state.connections)

    def hang_up(self) -> None:
        """On whoever still has not read his answer."""
        for connection in list(self.connections):
            if connection.cycle is not None and not connection.cycle.response_complete:
                connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
