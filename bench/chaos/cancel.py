"""The round of clients that vanish: at random moments of every phase, politely or with a reset."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections import Counter
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

from bench.chaos.asks import Ask
from bench.chaos.scene import Round, Scene

WIDTH: Final = 24
"""How many such clients are there at a time."""

BESIDE: Final = 2
"""Answers under way beside them, which must notice nothing."""

SOON_S: Final = 5.0
"""1 s is promised, and a busy machine is given some more."""

_LONGEST_S: Final = 0.6
_PATIENCE_S: Final = 5.0
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time at all

UNANSWERED: Final = "before the first byte"
ANSWERING: Final = "during the answer"
ANSWERED: Final = "after the answer"


async def cancel(scene: Scene, count: int) -> Round:
    """`count` clients that vanish; soon after no worker may hold anything of any request (R4)."""
    phases: Counter[str] = Counter()
    async with scene.round("cancel") as found:
        since = time.perf_counter()
        traffic = scene.traffic(width=BESIDE)
        found.runs = traffic.runs
        clients = iter(range(count))

        async def keep_vanishing() -> None:
            for number in clients:
                url = scene.house.urls[number % len(scene.house.urls)]
                phases[await _vanish(scene, url)] += 1

        async with traffic.flowing(), asyncio.TaskGroup() as group:
            for _ in range(WIDTH):
                group.create_task(keep_vanishing())
        took = time.perf_counter() - since
        left = await scene.house.left_over(SOON_S)
        found.wrong += [f"{SOON_S:g} s after the last client: {line}" for line in left]
        found.facts["clients that vanished"] = count
        for phase in (UNANSWERED, ANSWERING, ANSWERED):
            found.facts[f"  {phase}"] = phases[phase]
        found.facts["vanished per second"] = round(count / took, 1)
    found.require(not found.recoveries, f"moved for nothing: {dict(found.recoveries)}")
    found.judge()
    return found


async def _vanish(scene: Scene, url: str) -> str:
    """One client: sends a request, goes away at a moment of its choice. Returns when that was."""
    rng, address = scene.rng, urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(_request(scene, address.netloc))
        if rng.random() < 0.5:
            stay = _LONGEST_S * rng.random() ** 2  # mostly short: there are many phases early on
            phase = await _listen(reader, stay, reads=1000)
        else:
            phase = await _listen(reader, _PATIENCE_S, reads=rng.randrange(1, 20))
    finally:
        if rng.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return phase


async def _listen(reader: asyncio.StreamReader, stay: float, reads: int) -> str:
    """For so many seconds, or until something was read so often."""
    phase = UNANSWERED
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(stay):
            for _ in range(reads):
                if not await reader.read(1 << 16):
                    return ANSWERED
                phase = ANSWERING
    return phase


def _request(scene: Scene, host: str) -> bytes:
    """Any ask of the book, its prompt in no cache, and with an answer so long that it would still
    be under way, and show, when nobody is left to read it."""
    ask: Ask = scene.rng.choice(scene.entries).ask
    body: dict[str, Any] = {
        **{name: value for name, value in ask.body.items() if name != "stop"},
        "cache_salt": f"{scene.rng.getrandbits(64):x}",
        "max_tokens": 3 * scene.longest // 4 - 64,  # prompts take a quarter at most
        "ignore_eos": True,
    }
    data = json.dumps(body).encode()
    head = (
        f"POST {ask.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data
