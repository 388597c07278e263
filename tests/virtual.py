"""Virtual time: an event loop that jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Deadlock(Exception):
    """Everybody waits and no timer is set."""


class _Jump(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout == 0:
            return []  # there is work: no need to ask the system
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Deadlock
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now

    def hold_up(self, seconds: float) -> None:
        """As if a callback had taken so long, or the processor had been elsewhere."""
        self._jump.now += seconds


def run(main: Coroutine[Any, Any, T], limit: float = 3600.0) -> T:
    """Run to the end on virtual time. Raises TimeoutError after `limit` virtual seconds."""

    async def limited() -> T:
        async with asyncio.timeout(limit):
            return await main

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(limited())


def on_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A decorator for tests."""

    @wraps(test)
    def timed(*args: P.args, **kwargs: P.kwargs) -> None:
        run(test(*args, **kwargs))

    return timed


def clock() -> float:
    """The running loop's time, for control code that takes a Clock."""
    return asyncio.get_running_loop().time()


def hold_up(seconds: float) -> None:
    """The running loop comes late to whatever is due next."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.hold_up(seconds)
