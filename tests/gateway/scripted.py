"""Workers that play a part, for the gateway's control code alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from cluster.messages import (
    DECODE,
    PREFILL,
    Cancel,
    Event,
    Fingerprint,
    Generate,
    Hello,
    KVLayout,
    Landing,
    LayerGroup,
    Load,
    Order,
    Peer,
    Prefill,
    Promise,
    Promised,
    Report,
    Start,
    Token,
)
from gateway.pools import Member, Pools
from gateway.sequencer import Sequencer
from tests.virtual import clock

Part = Callable[[Order], Iterable[Event]]

LAYOUT = KVLayout((LayerGroup(2, 1, 4),), "float32")


def hello(name: str, role: str, incarnation: int = 1, **changes: object) -> Hello:
    fields: dict[str, object] = {
        "peer": Peer(name, incarnation),
        "role": role,
        "model": "m",
        "fingerprint": Fingerprint("config", "weights"),
        "layout": LAYOUT,
        "control_address": name,
        "block_size": 16,
        "blocks": 100,
    }
    return Hello(**{**fields, **changes})  # type: ignore[arg-type]


def landing(name: str = "d") -> Landing:
    return Landing("0" * 32, 1, Peer(name, 1), name, 0, 10.0)


def obliging(order: Order) -> list[Event]:
    """Does what any worker is asked: token number i of an answer is 100 + i."""
    match order:
        case Promise(request, attempt):
            return [Promised(request.id, attempt, landing())]
        case Prefill(request, _, attempt):
            index = request.emitted
            finish = "length" if index + 1 == request.sampling.max_tokens else ""
            return [Token(request.id, attempt, index, 100 + index, finish, cached_tokens=3)]
        case Start(request_id, first, attempt):
            index = first - 100
            return [
                Token(request_id, attempt, index + 1, first + 1),
                Token(request_id, attempt, index + 2, first + 2, "length"),
            ]
        case Generate(request, attempt):
            last = request.sampling.max_tokens - 1
            return [
                Token(request.id, attempt, i, 100 + i, "length" if i == last else "")
                for i in range(request.emitted, last + 1)
            ]
    return []


class Scripted:
    """A gateway's pools and sequencer over workers that play the parts given by name."""

    def __init__(self, **options: object) -> None:
        self.parts: dict[str, Part] = {}
        self.orders: dict[str, list[Order]] = {}
        self._ends: dict[str, asyncio.Queue[Report | None]] = {}
        self.pools = Pools("m", "config", self.connect)
        self.sequencer = Sequencer(self.pools, clock=clock, **options)  # type: ignore[arg-type]

    def add(self, name: str, role: str, part: Part = obliging, **changes: object) -> Member:
        self.parts[name] = part
        self.orders[name] = []
        return self.pools.join(hello(name, role, **changes))  # type: ignore[arg-type]

    def pair(self, prefill: Part = obliging, decode: Part = obliging) -> tuple[Member, Member]:
        return self.add("p", PREFILL, prefill), self.add("d", DECODE, decode)

    def beat(self, member: Member, **load: int) -> None:
        self.pools.report(member, Load(progress=1, **load))

    def say(self, name: str, *events: Event) -> None:
        self._ends[name].put_nowait(Report(events))

    def hang_up(self, name: str) -> None:
        self._ends[name].put_nowait(None)

    def kinds(self, name: str) -> list[str]:
        return [type(order).__name__ for order in self.orders[name]]

    def cancels(self, name: str) -> list[Cancel]:
        return [order for order in self.orders[name] if isinstance(order, Cancel)]

    async def connect(self, name: str, orders: AsyncIterator[Order]) -> AsyncIterator[Report]:
        reports = self._ends[name] = asyncio.Queue()
        playing = asyncio.create_task(self._play(name, orders, reports))
        try:
            while (report := await reports.get()) is not None:
                yield report
        finally:
            playing.cancel()

    async def _play(
        self, name: str, orders: AsyncIterator[Order], reports: asyncio.Queue[Report | None]
    ) -> None:
        async for order in orders:
            self.orders[name].append(order)
            if events := tuple(self.parts[name](order)):
                reports.put_nowait(Report(events))
