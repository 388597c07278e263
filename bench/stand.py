"""Stand: a gateway and the workers of one mode, as fresh processes on given cores.

    mode      workers                 each
    pd        1 prefill + 1 decode    one core, one thread
    2xboth    2 undivided             one core, one thread
    1xboth    1 undivided             both cores, two threads

The gateway stays unpinned in every mode, like the client that measures: where there are no more
than the two cores, they share them with the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import aiohttp

from bench.server import free_ports
from cluster.config import GatewayConfig, WorkerConfig, child_environment, flags
from cluster.errors import StartError
from cluster.messages import BOTH, DECODE, PREFILL
from deploy.launcher import end_all

START_S: Final = 120.0


@dataclass(frozen=True)
class Seat:
    """One worker: its role and the cores that it stays on, a thread for each."""

    role: str
    cores: tuple[int, ...]


@dataclass(frozen=True)
class Mode:
    name: str
    seats: tuple[Seat, ...]


def modes(cores: Sequence[int]) -> tuple[Mode, ...]:
    """The three ways to use two cores."""
    one, two = cores
    return (
        Mode("pd", (Seat(PREFILL, (one,)), Seat(DECODE, (two,)))),
        Mode("2xboth", (Seat(BOTH, (one,)), Seat(BOTH, (two,)))),
        Mode("1xboth", (Seat(BOTH, (one, two)),)),
    )


def commands(
    mode: Mode,
    chunk: int,
    base: WorkerConfig,
    port: int,
    grpc_port: int,
    front: GatewayConfig | None = None,
) -> list[list[str]]:
    """The arguments of every process of a mode, the gateway's first; `front` is what else it is
    told."""
    gateway = replace(
        front or GatewayConfig(),
        model=base.model,
        port=port,
        grpc_port=grpc_port,
        log_level=base.log_level,
    )
    plan = [["gateway", *flags(gateway, GatewayConfig)]]
    for number, seat in enumerate(mode.seats):
        worker = replace(
            base,
            role=seat.role,
            name=f"{seat.role}-{number}",
            join=(f"127.0.0.1:{grpc_port}",),
            pin=seat.cores,
            threads=len(seat.cores),
            max_num_batched_tokens=chunk,
        )
        plan.append(["worker", *flags(worker, WorkerConfig)])
    return plan


@dataclass(frozen=True)
class House:
    """A cluster that is ready."""

    url: str
    gateway_pid: int


@asynccontextmanager
async def running(mode: Mode, chunk: int, base: WorkerConfig) -> AsyncIterator[str]:
    """The URL of a cluster that is ready; it ends with the block. Raises StartError."""
    async with house(mode, chunk, base) as ready:
        yield ready.url


@asynccontextmanager
async def house(
    mode: Mode,
    chunk: int,
    base: WorkerConfig,
    front: GatewayConfig | None = None,
    api_key: str = "",
) -> AsyncIterator[House]:
    """A cluster that is ready; it ends with the block. `api_key` is one that `front` accepts, if it
    asks for any. Raises StartError."""
    port, grpc_port = free_ports(2)
    children: list[asyncio.subprocess.Process] = []
    url = f"http://127.0.0.1:{port}"
    try:
        for arguments in commands(mode, chunk, base, port, grpc_port, front):
            # One by one: what has been started must be known here when the next one fails.
            children.append(await _start(arguments))  # noqa: PERF401
        await _until_ready(url, len(mode.seats), children, api_key)
        yield House(url, children[0].pid)
    finally:
        await end_all(children)


async def _start(arguments: list[str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cluster.cli",
        *arguments,
        "--die-with",
        str(os.getpid()),
        env=child_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us: we end the children in order
    )


async def _until_ready(
    url: str, workers: int, children: Sequence[asyncio.subprocess.Process], api_key: str
) -> None:
    """Ask the gateway until every worker has joined. Raises StartError."""
    try:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        async with asyncio.timeout(START_S), aiohttp.ClientSession(headers=headers) as client:
            while len((await _status(client, url)).get("workers", ())) < workers:
                ended = [child.returncode for child in children if child.returncode is not None]
                if ended:
                    raise StartError(f"a process ended with status {ended[0]} before it was ready")
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StartError(f"the cluster was not ready within {START_S:g} s") from None


async def _status(client: aiohttp.ClientSession, url: str) -> Mapping[str, Any]:
    with contextlib.suppress(aiohttp.ClientError):
        async with client.get(f"{url}/status") as response:
            if response.status == 200:
                return dict(await response.json())
    return {}
