"""Server: an HTTP server, ours or not, as a process that ends with a block."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import aiohttp

from cluster.config import child_environment
from cluster.errors import StartError
from deploy.launcher import end_all

START_S: Final = 300.0  # vLLM compiles first


@dataclass(frozen=True)
class Server:
    """How to start one. `{port}` and `{inner}` in its command become free ports."""

    name: str
    command: tuple[str, ...]
    ready: str  # answers 200 once it serves


@asynccontextmanager
async def running(server: Server, session: aiohttp.ClientSession) -> AsyncIterator[str]:
    """The URL of a server that is ready; it ends with the block. Raises StartError."""
    port, inner = free_ports(2)
    command = [word.format(port=port, inner=inner) for word in server.command]
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            env=child_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us: we end the children in order
        )
    except OSError as error:
        raise StartError(f"{server.name}: {error.strerror}") from None
    try:
        url = f"http://127.0.0.1:{port}"
        await _until_ready(server, url, session, child)
        yield url
    finally:
        await end_all([child])


async def _until_ready(
    server: Server, url: str, session: aiohttp.ClientSession, child: asyncio.subprocess.Process
) -> None:
    try:
        async with asyncio.timeout(START_S):
            while True:
                if child.returncode is not None:
                    raise StartError(f"{server.name} ended with {child.returncode} before serving")
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(url + server.ready) as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StartError(f"{server.name} was not ready within {START_S:g} s") from None


def free_ports(count: int) -> Sequence[int]:
    """Ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as held:
        listeners = [
            held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [listener.getsockname()[1] for listener in listeners]
