"""Calls: how long each call that is being answered may take, and how all of them are ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.errors import DeadlineExceeded, Draining


class Calls:
    """Owned by the event loop. Until `drain` calls come in; after `cut` none goes on."""

    def __init__(self) -> None:
        self.draining = False
        self._over = False
        self._limits: set[asyncio.Timeout] = set()

    def admit(self) -> None:
        """Raises Draining once this gateway is about to end."""
        if self.draining:
            raise Draining("This server is about to end. Please try again.", retry_after=1)

    def drain(self) -> None:
        self.draining = True

    def cut(self) -> None:
        """The blocks of all calls raise Draining now."""
        self._over = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(now)

    @asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """One call's block. Raises DeadlineExceeded when it takes longer, Draining after `cut`."""
        try:
            async with asyncio.timeout(0 if self._over else seconds) as limit:
                self._limits.add(limit)
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            if self._over:
                raise Draining(
                    "This server ended before the answer was complete. Please try again.",
                    retry_after=1,
                ) from None
            raise DeadlineExceeded("The answer took longer than the time limit.") from None
        finally:
            self._limits.discard(limit)
