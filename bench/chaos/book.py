"""Book: what every ask is answered when nothing happens, which is what every answer is held to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp

from bench.chaos.asks import Ask
from bench.chaos.heard import Heard, Said, call
from cluster.errors import StartError

EQUAL: Final = "equal"
DIFFERENT: Final = "different"


@dataclass(frozen=True)
class Entry:
    """`ttft` is the undisturbed one, in seconds; `events` counts those of the stream."""

    ask: Ask
    said: Said
    ttft: float
    events: int

    def verdict(self, heard: Heard) -> str:
        """EQUAL, DIFFERENT, or the code of the error that ended it.

        An error excuses what was not said. What was said before it must be right all the same.
        """
        if heard.error:
            return heard.error if heard.said.begins(self.said) else DIFFERENT
        return EQUAL if heard.said.equals(self.said) else DIFFERENT


async def record(session: aiohttp.ClientSession, url: str, asks: Sequence[Ask]) -> list[Entry]:
    """Ask all of it, one by one. Every fourth streamed answer of one choice is asked for again,
    ended by a stop string out of its own text. Raises StartError for an answer that fails."""
    entries: list[Entry] = []
    for number, ask in enumerate(asks):
        entry = await _ask(session, url, ask)
        if number % 4 == 2 and ask.streamed and len(entry.said.choices) == 1:
            entry = await _ask(session, url, ask.with_stop(entry.said.choices[0].text))
        entries.append(entry)
    return entries


async def _ask(session: aiohttp.ClientSession, url: str, ask: Ask) -> Entry:
    heard = Heard(ask, url)
    await call(session, url, heard)
    if heard.error:
        raise StartError(f"the undisturbed answer to {ask.name!r} failed: {heard.error}")
    return Entry(ask, heard.said, heard.times[1] - heard.times[0], len(heard.times) - 2)


def dealt(entries: Sequence[Entry], count: int, rng: random.Random) -> list[Entry]:
    """`count` of them in random order, each as often as any other."""
    rounds = -(-count // len(entries))
    return [entry for _ in range(rounds) for entry in rng.sample(entries, len(entries))][:count]
