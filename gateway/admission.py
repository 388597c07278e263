"""Admission: who is let in, to which workers, and how long a newcomer would wait for that.

    newcomer --> would it wait too long? --> its place in the fair queue --> a Route
                 Overloaded, with when       NoWorkers, Overloaded

The workers' own queues are kept short: a worker is given about half a second's reading ahead
(`pace.Reading`), and decode workers say when they are full. So all waiting is done here, where
there is an order to it, and how long it will be follows from what was measured: the tokens to be
read before a newcomer, over the speed of reading; and once decode workers have refused for want of
room, the room wanted before it, over the speed at which room has been found since.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from cluster.clock import Clock
from cluster.errors import NoWorkers, Overloaded
from cluster.messages import Request
from gateway.fair import FairQueue, Place, Standing
from gateway.pace import Pace
from gateway.pools import Member, Pools, Route

FIRST_ANSWER: Final = 256
"""How many tokens an answer is taken to have, at most, while none has ended yet."""

ANSWERS: Final = 32
"""Over about how many answers their mean length is taken."""

LOOK_AGAIN_S: Final = 1.0
"""Who waits looks no more often than this whether any worker is there."""

Offer = Callable[[], Route | None]
"""Where a request can go now; None: nowhere yet."""


class Seat:
    """One answer's way in, for as long as it runs: its place in the queue, and the worker that is
    to read its prompt."""

    def __init__(self, admission: Admission, place: Place[Route], request_id: str) -> None:
        self.place = place
        self._admission = admission
        self.since = 0.0  # when it began to wait
        self._id = request_id
        self._reader: Member | None = None

    async def turn(self, offer: Offer) -> Route:
        """Wait for what `offer` has. Raises NoWorkers, Overloaded and what `offer` raises."""
        self._drop()
        self.place.offer = offer
        return await self._admission.turn(self)

    def take(self, route: Route, tokens: int) -> None:
        """This is where it goes, with a prompt so long. To be said as part of the offer."""
        self._drop()
        self._reader = route.prefill or route.decode
        assert self._reader is not None
        self._reader.reading.add(self._id, tokens, self._admission.clock())

    def through(self) -> None:
        """It has found room: who is next need not wait for it to be read. Idempotent."""
        if self.place.trying:
            self._admission.found_room(self.place)

    def read(self, cached: int) -> None:
        """Its worker has read it, but for the tokens that a prefix cache held."""
        if self._reader is not None:
            self._reader.reading.done(self._id, cached, self._admission.clock())
        self.leave()

    def leave(self) -> None:
        """Its worker will not read it, or has. Idempotent."""
        if self._drop():
            self._admission.more_room()

    def _drop(self) -> bool:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.reading.drop(self._id)
        return reader is not None


class Admission:
    """At most `max_waiting` requests wait for a first token, but a tenant of whom none does may
    always have one. A call that would wait longer than `max_delay` to be let in is refused; 0: none
    is. Owned by the event loop.
    """

    def __init__(
        self,
        pools: Pools,
        clock: Clock,
        *,
        max_waiting: int,
        max_delay: float,
        queue_timeout: float,
        no_worker_timeout: float,
    ) -> None:
        self.clock = clock
        self.waiting = 0
        self._pools = pools
        self._max_waiting = max_waiting
        self._max_delay = max_delay
        self._queue_timeout = queue_timeout
        self._no_worker_timeout = no_worker_timeout
        self._queue: FairQueue[Route] = FairQueue()
        self._by_tenant: Counter[str] = Counter()
        self._nobody_since = -math.inf  # infinity while some worker is there
        self._room = Pace()
        self._short_since: float | None = None  # of room: since it was, or was last found
        self._answer_tokens = float(FIRST_ANSWER)  # the mean
        pools.listen(self._news)
        self._news()

    @property
    def held_back(self) -> int:
        """Requests in the queue."""
        return self._queue.waiting

    def admit(self, standing: Standing, requests: int = 1) -> None:
        """Raises Overloaded, with when the call would have been let in."""
        delay = self.delay(standing)
        if self._max_delay and delay > self._max_delay:
            raise Overloaded(
                "Too much is waiting to be computed.", retry_after=delay - self._max_delay
            )
        if self.waiting + requests > self._max_waiting and self._by_tenant[standing.tenant]:
            raise Overloaded("Too many requests are waiting.", retry_after=1)

    def delay(self, standing: Standing) -> float:
        """Seconds until a newcomer would be let in; 0 while too little was measured to tell."""
        ahead = self._queue.ahead(standing)
        if not ahead or not self._queue.waiting:
            return 0.0
        delay, readers = 0.0, self._pools.readers()
        known = [rate for member in readers if (rate := member.reading.rate)]
        if known:
            rate = sum(known) / len(known) * len(readers)
            delay = self._queue.waiting_tokens * (ahead / self._queue.waiting_cost) / rate
        if self._short_since is not None and self._room.rate:
            delay = max(delay, ahead / self._room.rate)
        return delay

    @contextmanager
    def seat(self, request: Request, standing: Standing) -> Iterator[Seat]:
        """A request takes of its tenant's share what is computed for it: prompt and answer."""
        prompt = len(request.tokens)
        answer = min(request.sampling.max_tokens - request.emitted, self._answer_tokens)
        seat = Seat(self, self._queue.place(standing, prompt + answer, prompt), request.id)
        try:
            with seat.place:
                yield seat
        finally:
            seat.leave()
            if not self._queue.busy:
                self._short_since = None
            self._queue.news()  # what it held is free

    def ended(self, seat: Seat, computed: int, emitted: int) -> None:
        """So many tokens of its prompt were computed, and so many of the answer came."""
        seat.place.settle(computed + emitted)
        if emitted:
            self._answer_tokens += (emitted - self._answer_tokens) / ANSWERS

    @contextmanager
    def counted(self, seat: Seat) -> Iterator[None]:
        """Inside, the request waits for its first token."""
        tenant = seat.place.standing.tenant
        seat.since = self.clock()
        self.waiting += 1
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self.waiting -= 1
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]

    # For seats.

    async def turn(self, seat: Seat) -> Route:
        if seat.place.trying and self._short_since is None:
            self._short_since = self.clock()
        give_up = seat.since + self._queue_timeout
        while True:
            alone_until = max(seat.since, self._nobody_since) + self._no_worker_timeout
            now = self.clock()
            look_again = now + max(LOOK_AGAIN_S, self._no_worker_timeout)
            until = min(give_up, alone_until, look_again)
            with suppress(TimeoutError):
                return await seat.place.turn(until - now)
            now = self.clock()
            if self._nobody_since < math.inf and now >= alone_until:
                raise NoWorkers("No worker is there to take this request.", retry_after=2)
            if now >= give_up:
                delay = self.delay(seat.place.standing)
                raise Overloaded("No worker had room in time.", retry_after=max(5.0, delay))

    def found_room(self, place: Place[Route]) -> None:
        if self._short_since is not None:
            now = self.clock()
            self._room.add(place.cost, now - self._short_since)
            self._short_since = now
        place.through()

    def more_room(self) -> None:
        self._queue.let_in()

    def _news(self) -> None:
        """A worker has come, gone or said how it is."""
        if self._pools.staffed():
            self._nobody_since = math.inf
        elif self._nobody_since == math.inf:
            self._nobody_since = self.clock()
        self._queue.news()
