"""Trace: what is asked of every mode and when, a pure function of a few numbers and a seed.

quiet    short chats at a steady rate, alone
loaded   the same rate, and long prompts that arrive at intervals
flood    everything at once: how much there is in it when nobody looks at the tail
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

from bench.load import arrival_times

CHAT: Final = "chat"
LONG: Final = "long"
QUIET: Final = "quiet"
LOADED: Final = "loaded"
FLOOD: Final = "flood"
PROBES: Final = "probes"


@dataclass(frozen=True)
class Pace:
    """Chats per second, and seconds between two long prompts."""

    rate: float
    long_every: float


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, phases in seconds or in how many long prompts they see."""

    chat_prompt: int = 48
    chat_answer: int = 48
    long_prompt: int = 1500
    long_answer: int = 8
    quiet_s: float = 6.0
    longs: int = 6
    flood_chats: int = 16
    flood_longs: int = 2


@dataclass(frozen=True)
class Ask:
    """One request: when, counted from the phase's start, and what."""

    at: float
    kind: str  # CHAT or LONG
    prompt: tuple[int, ...]
    answer_tokens: int

    def body(self, model: str) -> bytes:
        """Greedy and to the last token, so that length and text are the same wherever it runs."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.answer_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()


@dataclass(frozen=True)
class Phase:
    """Requests in the order in which they are sent."""

    name: str
    asks: tuple[Ask, ...]

    @cached_property
    def digest(self) -> str:
        """Tells whether two runs were asked the same."""
        asks = json.dumps([asdict(ask) for ask in self.asks])
        return hashlib.blake2b(asks.encode(), digest_size=8).hexdigest()


class Writer:
    """Draws prompts. No two phases share one, so that none meets a warm prefix cache."""

    def __init__(self, ids: Sequence[int], sizes: Sizes, seed: int) -> None:
        self._ids = ids
        self._sizes = sizes
        self._seed = seed

    def steady(self, name: str, pace: Pace, *, seconds: float, longs: int = 0) -> Phase:
        """Chats like a metronome for `seconds`; long prompts in the middle of their intervals."""
        rng = self._rng(name)
        chats = max(1, math.floor(seconds * pace.rate))
        asks = [self._chat(at, rng) for at in arrival_times(chats, pace.rate, math.inf, 0)]
        asks += [self._long((number + 0.5) * pace.long_every, rng) for number in range(longs)]
        return Phase(name, tuple(sorted(asks, key=lambda ask: ask.at)))

    def at_once(self, name: str, *, chats: int, longs: int) -> Phase:
        """The long prompts first: who lets them block the chats shows it."""
        rng = self._rng(name)
        asks = [self._long(0.0, rng) for _ in range(longs)]
        return Phase(name, (*asks, *(self._chat(0.0, rng) for _ in range(chats))))

    def probes(self) -> Phase:
        """A few fixed prompts, from one token to several chunks, whose answers must agree."""
        rng = self._rng(PROBES)
        longest = self._sizes.long_prompt
        lengths = (1, 7, self._sizes.chat_prompt, max(1, longest // 4))
        tokens = self._sizes.chat_answer
        return Phase(PROBES, tuple(Ask(0.0, CHAT, self._draw(n, rng), tokens) for n in lengths))

    def _chat(self, at: float, rng: random.Random) -> Ask:
        prompt = self._draw(self._sizes.chat_prompt, rng)
        return Ask(at, CHAT, prompt, self._sizes.chat_answer)

    def _long(self, at: float, rng: random.Random) -> Ask:
        return Ask(at, LONG, self._draw(self._sizes.long_prompt, rng), self._sizes.long_answer)

    def _draw(self, length: int, rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.choices(self._ids, k=length))

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self._seed}:{name}")
