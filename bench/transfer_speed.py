"""GB/s of each transport, of raw sockets and of memcpy; and what the checks take of it.

A transport's number is whole handoffs: KV gathered from pages on one core by the real Sender,
written to pages on another by the real Landings, from the first announcement to the seal. The raw
sockets move as many bytes in chunks of the same size, a byte coming back for each, and gather and
scatter nothing. memcpy copies them chunk by chunk within one process.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import zmq

from bench.transfer_end import (
    ALL,
    BLOCK,
    CURVE,
    IPC,
    LAYOUT,
    NO_DIGEST,
    NONE,
    RAW_TCP,
    RAW_UNIX,
    SHARED,
    TCP,
    Settings,
    credentials,
    digest_for,
    hello,
)
from cluster.errors import BatonError, StartError
from cluster.messages import Landing, Peer
from engine.blocks import Block
from engine.cache import KVCache
from kvtransfer.link import FramedLink, Link
from kvtransfer.sender import Announcement, Carried, Handoff, Sender
from kvtransfer.shared_memory import SharedMemoryWire
from kvtransfer.zeromq import ZmqWire

MEMCPY: Final = "memcpy"
STEP_TOKENS: Final = 512
"""Tokens of a prompt that are computed at a time, and so announced."""
CHECKED: Final = 2 << 20
"""The size of chunk at which the checks are left out: what a worker uses unless told otherwise."""


@dataclass(frozen=True)
class Speed:
    """Of one transport at one chunk size. `runs` are GB/s."""

    transport: str
    chunk_bytes: int
    checks: str
    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gb_per_s": round(self.median, 3)}


@asynccontextmanager
async def receiving(settings: Settings) -> AsyncIterator[tuple[Any, asyncio.subprocess.Process]]:
    """A receiving process that is ready, and what it said. Raises StartError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.transfer_end",
        json.dumps(asdict(settings)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield await _line(process), process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _line(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise StartError("the receiving process ended; what it wrote is above")
    return json.loads(line)


class Pusher:
    """The sending side: pages full of KV, and a Sender over the transport in question."""

    def __init__(self, settings: Settings, cache: KVCache, chunk: int) -> None:
        self._settings = settings
        self._cache = cache
        self._chunk = chunk
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._hello = hello(Peer("prefill", int.from_bytes(os.urandom(7))), "prefill")
        self._ended: asyncio.Future[BatonError | None] | None = None
        self._slots = cache.slots_of([Block(n, 0) for n in range(cache.blocks)], 0, settings.tokens)
        self.sender = Sender(cache, self._connect, self._released, chunk)

    def close(self) -> None:
        self._context.destroy(linger=0)

    async def push(self, landing: Landing) -> float:
        """Seconds from the first announcement to the seal. Raises BatonError."""
        tokens = self._settings.tokens
        self._ended = asyncio.get_running_loop().create_future()
        handoff = Handoff(landing.id, 1, landing, tokens)
        self.sender.open(handoff)
        started = time.perf_counter()
        for announcement in self._announcements():
            self.sender.announce(*handoff.key, announcement)
        self.sender.finish(*handoff.key)
        if error := await self._ended:
            raise error
        return time.perf_counter() - started

    def _announcements(self) -> Iterator[Announcement]:
        """As a prefill worker makes them: a part of the layers of one step's tokens at a time."""
        for start in range(0, self._settings.tokens, STEP_TOKENS):
            tokens = range(start, min(start + STEP_TOKENS, self._settings.tokens))
            size = self._cache.token_bytes(range(1)) * len(tokens)
            layers = max(1, self._chunk // size)
            for first in range(0, LAYOUT.layers, layers):
                part = range(first, min(first + layers, LAYOUT.layers))
                yield Announcement(part, tokens, self._slots[tokens.start : tokens.stop])

    def _connect(self, landing: Landing) -> Link:
        digest = digest_for(self._settings.checks)
        if self._settings.transport == SHARED:
            near = SharedMemoryWire(landing.peer)
            return FramedLink(near, self._hello, landing.peer, rooms=near, digest=digest)
        wire = ZmqWire(self._context, landing.address, credentials(self._settings))
        return FramedLink(wire, self._hello, landing.peer, digest=digest)

    def _released(self, handoff: Handoff, error: BatonError | None, carried: Carried) -> None:
        assert self._ended is not None
        self._ended.set_result(error)


async def pushed(settings: Settings, cache: KVCache, rounds: int) -> list[Speed]:
    """The speeds of a transport. The first handoff of each connects and is not counted."""
    size = cache.token_bytes(range(LAYOUT.layers)) * settings.tokens
    if settings.transport == CURVE:
        settings = replace(settings, keys=tuple(zmq.curve_keypair()[1].decode() for _ in range(2)))
    found = []
    async with receiving(settings) as (_, process):
        for chunk in settings.chunks:
            runs = []
            pusher = Pusher(settings, cache, chunk)
            async with pusher.sender:
                for _ in range(rounds + 1):
                    assert process.stdin is not None
                    process.stdin.write(b"\n")
                    said = await _line(process)
                    landing = Landing(**{**said, "peer": Peer(**said["peer"])})
                    runs.append(size / await pusher.push(landing) / 1e9)
            pusher.close()
            found.append(Speed(settings.transport, chunk, settings.checks, tuple(runs[1:])))
    return found


async def raw(settings: Settings, size: int, rounds: int) -> list[Speed]:
    """The speeds of a plain socket."""
    unix = settings.transport == RAW_UNIX
    source = np.ones(size, dtype=np.uint8).data
    found = []
    async with receiving(settings) as (said, _):
        where = f"\0baton-bench-{said['where']}" if unix else ("127.0.0.1", said["where"])
        for chunk in settings.chunks:
            with closing(socket.socket(socket.AF_UNIX if unix else socket.AF_INET)) as connected:
                connected.connect(where)
                runs = [_sent(connected, source, chunk) for _ in range(rounds + 1)]
            found.append(Speed(settings.transport, chunk, "", tuple(runs[1:])))
    return found


def _sent(connected: socket.socket, source: memoryview, chunk: int) -> float:
    started = time.perf_counter()
    chunks = len(source) // chunk
    answered = 0
    for number in range(chunks):
        connected.sendall(source[number * chunk : (number + 1) * chunk])
        if number - answered >= 4:  # a few under way, as credit allows
            answered += len(connected.recv(64))
    while answered < chunks:
        answered += len(connected.recv(64))
    return chunks * chunk / (time.perf_counter() - started) / 1e9


def memcpy(size: int, chunk: int, rounds: int) -> Speed:
    source, target = np.ones(size, dtype=np.uint8), np.ones(chunk, dtype=np.uint8)
    runs = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for start in range(0, size - chunk + 1, chunk):
            np.copyto(target, source[start : start + chunk])
        runs.append(size // chunk * chunk / (time.perf_counter() - started) / 1e9)
    return Speed(MEMCPY, chunk, "", tuple(runs[1:]))


def filled(tokens: int) -> KVCache:
    """Pages of random KV, of which nothing compresses and nothing is zero."""
    cache = KVCache(LAYOUT, -(-tokens // BLOCK), BLOCK)
    for layer in range(LAYOUT.layers):
        cache.keys(layer).normal_()
        cache.values(layer).normal_()
    return cache


def plan(base: Settings) -> list[Settings]:
    """What is measured, in this order: each way, then the cost of the checks at CHECKED bytes."""
    ways = (MEMCPY, RAW_UNIX, RAW_TCP, SHARED, IPC, TCP, CURVE)
    less = [
        replace(base, transport=way, checks=checks, chunks=(CHECKED,))
        for way in (SHARED, TCP)
        for checks in (ALL, NO_DIGEST, NONE)
    ]
    return [replace(base, transport=way) for way in ways] + less


async def measure(settings: Settings, cache: KVCache, rounds: int) -> list[Speed]:
    """One Speed for each size of chunk. Raises StartError."""
    size = cache.token_bytes(range(LAYOUT.layers)) * settings.tokens
    if settings.transport == MEMCPY:
        return [memcpy(size, chunk, rounds) for chunk in settings.chunks]
    if settings.transport in (RAW_UNIX, RAW_TCP):
        return await raw(settings, size, rounds)
    return await pushed(settings, cache, rounds)
