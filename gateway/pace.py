"""Pace: how fast something is got through, measured; Reading: what a worker has to read, and how
fast it does."""

from __future__ import annotations

import math
from typing import Final

MEMORY_S: Final = 5.0
"""How far back a pace remembers, in seconds of the time that counts: a time constant."""

MEASURED_S: Final = 0.25
"""Before this much time that counts nothing is said."""

WINDOW_S: Final = 0.5
"""How much a worker is given to read ahead of what it has read, in its own time. Long enough that
it is never idle between two steps, short enough that it is no queue of its own."""

BUSY_TOKENS: Final = 256
"""A worker that has fewer tokens to read says nothing about its speed: its steps cost more than
what is in them. It may always be given this many."""

UNMEASURED_TOKENS: Final = 1024
"""What a worker is given ahead before its speed is known."""


class Pace:
    """Tokens per second over the last seconds of such time as counts."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """So many were got through in this long since the last time."""
        kept = math.exp(-seconds / MEMORY_S)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + seconds

    @property
    def rate(self) -> float:
        """0 while too little was measured."""
        return self._tokens / self._seconds if self._seconds >= MEASURED_S else 0.0


class Reading:
    """The prompts that one worker was given by this gateway and has not read yet.

    Its speed is measured from when it has enough to do until it has nothing, by whole prompts: that
    is what this gateway gets of it, whatever others ask of it meanwhile.
    """

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}
        self._tokens = 0
        self._busy_since: float | None = None
        self._served, self._computed = Pace(), Pace()

    @property
    def rate(self) -> float:
        """Prompt tokens per second, those that its prefix cache held among them; 0: not known."""
        return self._served.rate

    @property
    def speed(self) -> float:
        """Prompt tokens that it computed per second; 0: not known."""
        return self._computed.rate

    def takes(self, tokens: int) -> bool:
        """Whether a prompt so long would begin soon if it were sent now.

        A worker lets short prompts by while it reads a long one, so of each that it has as much
        counts as it reads until the new one is done: no more than the new one's length.
        """
        rate = self.rate
        window = max(BUSY_TOKENS, rate * WINDOW_S) if rate else UNMEASURED_TOKENS
        if self._tokens < window:
            return True
        return sum(min(tokens, other) for other in self._prompts.values()) < window

    def add(self, request_id: str, tokens: int, now: float) -> None:
        self._prompts[request_id] = tokens
        self._tokens += tokens
        if self._busy_since is None and self._tokens >= BUSY_TOKENS:
            self._busy_since = now

    def done(self, request_id: str, cached: int, now: float) -> None:
        """It was read, but for what a prefix cache held. Nothing if it was dropped before."""
        tokens = self._prompts.get(request_id, 0)
        if tokens and self._busy_since is not None:
            seconds, self._busy_since = now - self._busy_since, now
            self._served.add(tokens, seconds)
            self._computed.add(max(1, tokens - cached), seconds)
        self.drop(request_id)

    def drop(self, request_id: str) -> None:
        """It will not be read here. Idempotent."""
        self._tokens -= self._prompts.pop(request_id, 0)
        if not self._prompts:
            self._busy_since = None
