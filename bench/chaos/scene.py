"""Scene: the house, the book and the dice of a run; and what one round of it found."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from bench.chaos.book import DIFFERENT, EQUAL, Entry
from bench.chaos.heard import Heard, call
from bench.chaos.house import House
from bench.chaos.traffic import Run, Traffic

RECOVERIES: Final = "baton_recoveries_total"

LEASE_S: Final = 12.0
"""The default lease, and what a busy machine takes to sweep and to report."""

FELT_S: Final = 8.0
"""A pause that begins later than this after a blow has another reason."""

UNNOTICED_S: Final = 1.5
"""So long a dead worker may look alive, and be sent requests that it never reads."""

TWO_KILLED: Final = "engine_error"
"""What a request is answered that has lost two workers: it gets no third."""


@dataclass
class Blow:
    """`gone_s` is the time until no gateway counted on the worker, `pauses` what clients felt."""

    kind: str
    victim: str
    role: str
    incarnation: str
    at: float
    gone_s: float | None = None
    pauses: list[float] = field(default_factory=list)


@dataclass
class Round:
    """`wrong` has one line for each promise that was broken. Nothing else decides the exit."""

    name: str
    runs: list[Run] = field(default_factory=list)
    blows: list[Blow] = field(default_factory=list)
    recoveries: Counter[tuple[str, ...]] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    stuck: bool = False  # it ended before its time, and so must the run

    @property
    def verdicts(self) -> Counter[str]:
        return Counter(run.verdict for run in self.runs)

    def blows_at(self, run: Run, before: float = 0.0) -> int:
        """How many fell while this answer was under way, or up to so many seconds before."""
        heard = run.heard
        return sum(heard.started - before <= blow.at <= heard.ended for blow in self.blows)

    def killed_two(self, run: Run) -> bool:
        """Whether it was answered 500 by the rule: two workers died that had it, or could have."""
        return run.verdict == TWO_KILLED and self.blows_at(run, UNNOTICED_S) > 1

    def require(self, promise: bool, broken: str) -> None:
        if not promise:
            self.wrong.append(broken)

    def judge(self, excused: Callable[[Run], bool] = lambda run: False) -> None:
        """Every answer equal, but for errors that are `excused`; a wrong token never is."""
        for run in self.runs:
            verdict = run.verdict
            if verdict == DIFFERENT or (verdict != EQUAL and not excused(run)):
                heard, near = run.heard, self._last_blow(run)
                self.wrong.append(
                    f"{run.entry.ask.name} at {heard.gateway}: {verdict} after "
                    f"{heard.ended - heard.started:.2f} s with {self.blows_at(run)} blows; {near}"
                )

    def _last_blow(self, run: Run) -> str:
        before = [blow for blow in self.blows if blow.at <= run.heard.ended]
        if not before:
            return "no blow before its end"
        ago = run.heard.ended - before[-1].at
        return f"it ended {ago:.2f} s after {before[-1].kind} of {before[-1].victim}"

    def feel(self) -> None:
        """Give each blow the pauses of the answers that it moved."""
        for blow in self.blows:
            for run in self.runs:
                heard = run.heard
                hit = heard.started <= blow.at <= heard.ended and heard.recoveries
                if hit and run.entry.ask.streamed:
                    blow.pauses.append(heard.pause(blow.at, blow.at + FELT_S))


@dataclass
class Scene:
    """`longest` is the model's context in tokens, `width` how many answers are under way."""

    house: House
    session: aiohttp.ClientSession
    entries: Sequence[Entry]
    rng: random.Random
    longest: int
    width: int

    def traffic(self, width: int = 0) -> Traffic:
        """Over every gateway that the house has now."""
        return Traffic(self.session, self.house.urls, self.entries, self.rng, width or self.width)

    @asynccontextmanager
    async def round(self, name: str) -> AsyncIterator[Round]:
        """Begins and ends with every worker there; counts recoveries and looks for blocks left.

        A wait that was in vain ends the block, and is one of the things that went wrong.
        """
        found, since = Round(name), time.perf_counter()
        before = await self._counted()
        try:
            yield found
        except* TimeoutError as waits:
            found.stuck = True
            found.wrong += [str(wait) for wait in waits.exceptions]
            found.runs = [run for run in found.runs if run.heard.over.is_set()]
        found.left = await self.house.left_over(LEASE_S)
        found.wrong += [f"left over: {line}" for line in found.left]
        found.recoveries = grown(before, await self._counted())
        found.feel()
        found.seconds = time.perf_counter() - since

    @asynccontextmanager
    async def recovered(self) -> AsyncIterator[Counter[tuple[str, ...]]]:
        """Filled at the end of the block with what it saw of recoveries, by phase and cause."""
        seen: Counter[tuple[str, ...]] = Counter()
        before = await self._counted()
        yield seen
        seen.update(grown(before, await self._counted()))

    async def _counted(self) -> Counter[tuple[str, ...]]:
        return await self.house.counter(RECOVERIES, "phase", "cause")

    def streamed(self) -> Entry:
        """Any streamed one of a single choice."""
        return self.rng.choice(
            [e for e in self.entries if e.ask.streamed and len(e.said.choices) == 1]
        )

    async def strike(self, victim: str, kind: str, number: signal.Signals) -> Blow:
        """Send the signal. A gateway has neither role nor incarnation."""
        role = self.house.roles.get(victim, "gateway")
        incarnation = await self.house.incarnation(victim)
        self.house.signal(victim, number)
        return Blow(kind, victim, role, incarnation, time.perf_counter())

    async def ask(self, entry: Entry, gateway: str = "gateway-0") -> Run:
        """One answer, heard to its end."""
        run = Run(entry, Heard(entry.ask, self.house.gateways[gateway]))
        await call(self.session, run.heard.gateway, run.heard, f"{self.rng.getrandbits(64):x}")
        return run


def grown(
    before: Counter[tuple[str, ...]], after: Counter[tuple[str, ...]]
) -> Counter[tuple[str, ...]]:
    """How far counters have come, by phase and cause. A gateway that was started anew counts from
    0, so what it has is what it has added."""
    added: Counter[tuple[str, ...]] = Counter()
    for (gateway, *labels), count in after.items():
        was = before[(gateway, *labels)]
        added[tuple(labels)] += count - was if count >= was else count
    return +added


async def all_over(runs: Sequence[Run]) -> None:
    await asyncio.gather(*(run.heard.over.wait() for run in runs))
