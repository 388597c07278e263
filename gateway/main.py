"""`baton gateway`: puts the front, the pools and their two servers together and runs them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import grpc
import uvicorn

from cluster import process, rpc
from cluster.config import BUILT_IN, GatewayConfig, load, model_directory
from cluster.errors import HandshakeRefused, StartError
from cluster.messages import Hello, Load
from cluster.metrics import GatewayMetrics
from cluster.model import config_digest, load_config
from cluster.wire import codec
from gateway import inference
from gateway.app import create_app
from gateway.ask import Limits
from gateway.connection import Connection
from gateway.gateway import Gateway
from gateway.keys import Keys
from gateway.pools import Pools, serve_membership
from gateway.scrape import Siblings
from gateway.sequencer import Sequencer
from gateway.session import over_grpc
from gateway.text import TextPool
from gateway.tokens import Tokenizer

log = logging.getLogger(__name__)

ACTIVE_POLL_S = 0.05

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
        listeners = [bind(config.host, config.port)]
    directory = model_directory(config)
    gateway, pools = build(config, directory)
    if config.sibling:
        own = "{}:{}".format(*listeners[-1].getsockname()[:2])
        gateway.siblings = Siblings(config.port, config.sibling, config.sibling.index(own))
    server = rpc.new_server()
    server.add_generic_rpc_handlers((_registry(pools, f"{config.grpc_host}:{config.grpc_port}"),))
    inference.add_to_server(server, gateway)
    address = f"{config.grpc_host}:{config.grpc_port}"
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        raise StartError(f"cannot listen on {address}: choose another --grpc-port") from None
    http = _Uvicorn(
        uvicorn.Config(
            create_app(gateway),
            http=Connection,
            ws="none",
            proxy_headers=False,
            h11_max_incomplete_event_size=32 << 10,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, int(config.shutdown_timeout)),
        )
    )
    gateway.text.start()
    await server.start()
    watch = asyncio.create_task(pools.watch())
    serving = asyncio.create_task(http.serve(sockets=listeners))
    stop = asyncio.create_task(stopping.wait())
    log.info("gateway up", extra={"http": f"{config.host}:{config.port}", "grpc": address})
    await asyncio.wait((serving, stop, watch), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    http.should_exit = True
    stopped = asyncio.create_task(server.stop(config.shutdown_timeout))  # takes no new call
    await asyncio.wait((serving,))
    while gateway.active and not stopped.done():
        # Not until the server has stopped: members and health watchers have calls without an end.
        await asyncio.sleep(ACTIVE_POLL_S)
    watch.cancel()
    await pools.close()
    await asyncio.gather(server.stop(LAST_GRACE_S), stopped)
    gateway.text.stop()
    return await _verdict(serving, watch)


async def _verdict(*parts: asyncio.Task[None]) -> int:
    status = 0
    for ended in await asyncio.gather(*parts, return_exceptions=True):
        if isinstance(ended, Exception):
            log.critical("gateway broke", exc_info=ended)
            status = 1
    return status


def build(config: GatewayConfig, directory: Path) -> tuple[Gateway, Pools]:
    """Everything but the servers. Raises BadModel."""
    model = load_config(directory)
    tokenizer = Tokenizer.from_dir(directory)
    own_name = "baton-tiny" if directory == BUILT_IN else directory.resolve().name
    names = config.served_model_name or (own_name,)
    longest = config.max_model_len or model.max_model_len
    if longest > model.max_model_len:
        raise StartError(f"--max-model-len {longest}: the model ends at {model.max_model_len}")
    pools = Pools(names[0], config_digest(directory), over_grpc)
    metrics = GatewayMetrics(names[0], longest, pools.views)
    sequencer = Sequencer(
        pools,
        handed=metrics.handoff,
        max_waiting=config.max_waiting,
        queue_timeout=config.queue_timeout,
    )
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
        keys=Keys(config.api_key),
        metrics=metrics,
        defaults=defaults,
        version=_version(),
        created=int(time.time()),
        request_timeout_s=config.request_timeout,
    )
    return gateway, pools


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises StartError that names the port."""
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port"
        ) from None


def _registry(pools: Pools, name: str) -> grpc.GenericRpcHandler:
    async def join(
        messages: AsyncIterator[Hello | Load], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[str]:
        try:
            async with aclosing(serve_membership(pools, messages, name)) as welcomes:
                async for welcome in welcomes:
                    yield welcome
        except HandshakeRefused as error:
            log.warning("worker refused", extra={"reason": error.message})
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)

    return rpc.stream_handler(codec.JOIN, join, codec.decode_membership, codec.encode_welcome)


def _version() -> str:
    try:
        return version("baton-serve")
    except PackageNotFoundError:
        return "0+source"


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: this process has one place for signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
