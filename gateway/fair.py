"""FairQueue: whose request goes to the workers next.

    resumed answers  >  priorities, lowest first  >  tenants, by what each has had of its share

Among tenants of one priority it is start-time fair queueing: a request is stamped with the virtual
time at which its tenant's share reaches it, and the lowest stamp goes first. So of tenants that
wait at the same time each gets tokens in proportion to its weight, whatever the others ask for; who
was idle begins at the present, with neither savings nor debts. Within a tenant who came first is
served first.

Source: Goyal, Vin, Cheng, "Start-Time Fair Queueing", 1996, section 2.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

Rank = tuple[bool, int]
"""What is compared before any stamp: not resumed, then the priority."""

Entry = tuple[Rank, float, int, "Place[Any]"]


@dataclass(frozen=True, slots=True)
class Standing:
    """In whose name a request waits. The lowest `priority` comes first."""

    tenant: str = "anyone"
    weight: float = 1.0
    priority: int = 0


ANYBODY: Final = Standing()


@dataclass(slots=True)
class _Flow(Generic[T]):
    """What waits of one tenant at one rank. `first` alone has its stamp and is in the heap."""

    first: Place[T] | None = None
    behind: OrderedDict[Place[T], None] = field(default_factory=OrderedDict)
    behind_cost: float = 0.0
    finish: float = 0.0  # in virtual time: where what it has been given of its share ends


@dataclass(slots=True)
class _Level(Generic[T]):
    """One rank, as long as somebody of it waits or tries: otherwise there is nothing to share."""

    flows: dict[str, _Flow[T]] = field(default_factory=dict)
    now: float = 0.0  # virtual time: the latest stamp of those who were let in
    places: int = 0
    waiting_cost: float = 0.0


class Place(Generic[T]):
    """One request's place, for all the times that it has to queue. Left as a context it is given
    up, wherever it is. `cost` is what it takes of its tenant's share; `tokens`, its prompt's."""

    def __init__(self, queue: FairQueue[T], standing: Standing, cost: float, tokens: int) -> None:
        self.standing = standing
        self.cost = float(max(1, round(cost)))  # whole: sums of them come back to nought exactly
        self.tokens = tokens
        self.rank: Rank = (True, standing.priority)
        self.stamp = 0.0
        self.number = next(queue.numbers)
        self.offer: Callable[[], T | None] = lambda: None
        self.offered: asyncio.Future[T] | None = None  # while it waits
        self.trying = False  # let in, but neither through nor back
        self.served = False  # was let in at least once
        self._queue = queue

    def resume(self) -> None:
        """It has lost what it had: from now on it goes before all others, because somebody may have
        half of its answer."""
        if self.trying:
            self._queue.give_up(self)
        self.rank = (False, self.standing.priority)

    async def turn(self, timeout: float) -> T:
        """Wait to be let in: what `offer` had for it then. Asked for after a useless offer it takes
        the place back to where it was. After a TimeoutError, ask again to go on waiting.

        Raises what `offer` raised, too.
        """
        if self.offered is None:
            self.offered = asyncio.get_running_loop().create_future()
            self._queue.wait(self)
        if not self.offered.done():
            await asyncio.wait((self.offered,), timeout=timeout)
        if not self.offered.done():
            raise TimeoutError
        offered, self.offered = self.offered, None
        return offered.result()

    def through(self) -> None:
        """Room was found: whoever is next need wait for this one no longer. Idempotent."""
        if self.trying:
            self._queue.through(self)

    def settle(self, cost: float) -> None:
        """What it has cost in the end: its tenant's share is put right."""
        if self.served:
            self._queue.settle(self, cost)

    def __enter__(self) -> Place[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.trying:
            self._queue.give_up(self)
        elif self.offered is not None and not self.offered.done():
            self._queue.withdraw(self)


class FairQueue(Generic[T]):
    """Owned by the event loop. A place's `offer` says what it can have now; None: nothing yet.

    Only the first in line is made an offer: nobody overtakes, or large requests would starve. While
    offers prove good any number may be trying theirs at once. Once one was of no use the queue is
    shut until there is `news`, and then lets in one at a time until one is through.

    All is O(log tenants), but giving up a place that is first of its tenant: O(tenants).
    """

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.waiting = 0
        self.waiting_cost = 0.0
        self.waiting_tokens = 0
        self._careful = False  # the last offer was of no use
        self._shut = False
        self._trying = 0
        self._levels: dict[Rank, _Level[T]] = {}
        self._heap: list[Entry] = []

    @property
    def busy(self) -> bool:
        """Whether anybody waits, or has been let in and is not through."""
        return bool(self.waiting or self._trying)

    def place(self, standing: Standing, cost: float, tokens: int) -> Place[T]:
        return Place(self, standing, cost, tokens)

    def ahead(self, standing: Standing) -> float:
        """The cost of those waiting who would be let in before a newcomer with this standing."""
        rank = (True, standing.priority)
        cost = sum(level.waiting_cost for other, level in self._levels.items() if other < rank)
        level = self._levels.get(rank)
        if level is None:
            return cost
        stamp, own = level.now, level.flows.get(standing.tenant)
        if own is not None:
            stamp = max(stamp, own.finish + own.behind_cost / standing.weight)
            cost += own.behind_cost
        for place in (entry[-1] for entry in self._heap if entry[0] == rank):
            flow = level.flows[place.standing.tenant]
            if flow is own or flow.first is not place:
                cost += place.cost
            elif place.stamp <= stamp:
                share = (stamp - place.stamp) * place.standing.weight
                cost += max(place.cost, min(share, place.cost + flow.behind_cost))
        return cost

    def news(self) -> None:
        """There may be room where there was none."""
        self._shut = False
        self.let_in()

    def let_in(self) -> None:
        """As many as there are offers for."""
        while self._heap and not self._shut and not (self._careful and self._trying):
            place = self._heap[0][-1]
            assert place.offered is not None
            try:
                offer = place.offer()
            except Exception as error:  # it is this place's own: who is behind it goes on
                self._remove(place)
                place.offered.set_exception(error)
                place.offered.exception()  # seen, even if its owner has just been cancelled
                continue
            if offer is None:
                return
            level = self._levels[place.rank]
            level.now = max(level.now, place.stamp)
            place.trying = place.served = True
            self._trying += 1
            level.places += 1
            self._remove(place)
            place.offered.set_result(offer)

    # For places.

    def wait(self, place: Place[T]) -> None:
        level = self._levels.setdefault(place.rank, _Level())
        flow = level.flows.setdefault(place.standing.tenant, _Flow())
        level.places += 1
        if place.trying:
            self._careful = self._shut = True
            self._end_try(place)
            heapq.heappush(self._heap, _entry(place))
        elif place.served:  # resumed, and among those in the order of their arrival
            place.stamp = 0.0
            heapq.heappush(self._heap, _entry(place))
        else:
            flow.behind[place] = None
            flow.behind_cost += place.cost
            self._bring_up(level, flow)
        self._count(place, 1)
        self.let_in()

    def withdraw(self, place: Place[T]) -> None:
        """It waits no longer."""
        level = self._levels[place.rank]
        flow = level.flows[place.standing.tenant]
        if place is flow.first:
            flow.finish -= place.cost / place.standing.weight
        self._remove(place)
        self.let_in()

    def through(self, place: Place[T]) -> None:
        self._careful = False
        self.give_up(place)

    def give_up(self, place: Place[T]) -> None:
        self._end_try(place)
        self.let_in()

    def settle(self, place: Place[T], cost: float) -> None:
        level = self._levels.get((True, place.standing.priority))
        flow = None if level is None else level.flows.get(place.standing.tenant)
        if flow is not None:
            flow.finish += (cost - place.cost) / place.standing.weight

    def _remove(self, place: Place[T]) -> None:
        """It waits no longer, wherever it stood; the next of its tenant comes up."""
        level = self._levels[place.rank]
        flow = level.flows[place.standing.tenant]
        if place in flow.behind:
            del flow.behind[place]
            flow.behind_cost -= place.cost
        else:
            if self._heap[0][-1] is place:
                heapq.heappop(self._heap)
            else:
                self._heap.remove(_entry(place))
                heapq.heapify(self._heap)
            if place is flow.first:
                flow.first = None
                self._bring_up(level, flow)
        self._count(place, -1)
        self._leave(place)

    def _bring_up(self, level: _Level[T], flow: _Flow[T]) -> None:
        """Stamp the first of a tenant and list it."""
        if flow.first is None and flow.behind:
            place, _ = flow.behind.popitem(last=False)
            flow.behind_cost -= place.cost
            place.stamp = max(level.now, flow.finish)
            flow.finish = place.stamp + place.cost / place.standing.weight
            flow.first = place
            heapq.heappush(self._heap, _entry(place))

    def _end_try(self, place: Place[T]) -> None:
        place.trying = False
        self._trying -= 1
        self._leave(place)

    def _leave(self, place: Place[T]) -> None:
        level = self._levels[place.rank]
        level.places -= 1
        if not level.places:
            del self._levels[place.rank]

    def _count(self, place: Place[T], sign: int) -> None:
        self.waiting += sign
        self.waiting_cost += sign * place.cost
        self.waiting_tokens += sign * place.tokens
        self._levels[place.rank].waiting_cost += sign * place.cost


def _entry(place: Place[Any]) -> Entry:
    return place.rank, place.stamp, place.number, place
