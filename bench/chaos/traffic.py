"""Traffic: a steady number of answers under way while blows fall, each heard to its end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import aiohttp

from bench.chaos.book import Entry, dealt
from bench.chaos.heard import Heard, call

BEFORE_FIRST = 0.3
"""Share of the moments that fall between a request and its first token."""


@dataclass
class Run:
    """One answer and what it is held to."""

    entry: Entry
    heard: Heard

    @property
    def verdict(self) -> str:
        return self.entry.verdict(self.heard)


@dataclass
class Traffic:
    """`width` answers at a time, over all gateways in turn, until `stop` or `total` of them."""

    session: aiohttp.ClientSession
    gateways: Sequence[str]
    entries: Sequence[Entry]
    rng: random.Random
    width: int
    runs: list[Run] = field(default_factory=list)
    live: list[Run] = field(default_factory=list)
    _stopped: bool = False
    _ended: bool = False
    _next: asyncio.Future[Run | None] | None = None

    @property
    def verdicts(self) -> Counter[str]:
        return Counter(run.verdict for run in self.runs)

    @asynccontextmanager
    async def flowing(self, total: int | None = None) -> AsyncIterator[asyncio.Task[None]]:
        """Under way inside the block, heard to the last answer when it is left.

        Yields the task that ends with `total` answers; without a total the block decides.
        """
        flow = asyncio.create_task(self._flow(total))
        try:
            yield flow
            if total is None:
                self._stopped = True
            await flow
        finally:
            flow.cancel()
            with suppress(asyncio.CancelledError):
                await flow

    async def _flow(self, total: int | None) -> None:
        asks = self._asks(total)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.width):
                group.create_task(self._keep_asking(asks))
        self._ended = True
        self._tell_next(None)

    def _asks(self, total: int | None) -> Iterator[Entry]:
        while total is None:
            yield from dealt(self.entries, len(self.entries), self.rng)
        yield from dealt(self.entries, total, self.rng)

    async def _keep_asking(self, asks: Iterator[Entry]) -> None:
        for entry in asks:
            if self._stopped:
                return
            gateway = self.gateways[len(self.runs) % len(self.gateways)]
            # A salt of its own in half of them: else every prompt would soon be in a cache.
            salt = f"{self.rng.getrandbits(64):x}" if self.rng.random() < 0.5 else ""
            run = Run(entry, Heard(entry.ask, gateway))
            self.runs.append(run)
            self.live.append(run)
            asked = asyncio.create_task(call(self.session, gateway, run.heard, salt))
            if entry.ask.streamed:
                self._tell_next(run)
            try:
                await asked
            finally:
                asked.cancel()
                self.live.remove(run)

    def _tell_next(self, run: Run | None) -> None:
        if self._next is not None:
            self._next.set_result(run)
            self._next = None

    async def moment(self) -> bool:
        """Returns at a random token of a random answer, or before its first; False when there will
        be no other answer. One waiter at a time."""
        if self._ended:
            return False
        self._next = asyncio.get_running_loop().create_future()
        run = await self._next
        if run is None:
            return False
        if self.rng.random() < BEFORE_FIRST:
            await asyncio.sleep(self.rng.random() * run.entry.ttft)
        else:
            await run.heard.reached(1 + self.rng.randrange(run.entry.events))
        return True
