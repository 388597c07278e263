from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack
from random import Random

import pytest

from gateway.fair import FairQueue, Place, Standing
from tests.virtual import on_virtual_time

A, B, C = (Standing(name) for name in "abc")


class Line:
    """A queue that lets in as many as there is room for; `went` is in which order."""

    def __init__(self, room: int = 0) -> None:
        self.queue: FairQueue[str] = FairQueue()
        self.room = room
        self.went: list[str] = []
        self.places: dict[str, Place[str]] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._open = ExitStack()

    def come(self, name: str, standing: Standing = A, cost: float = 1.0) -> Place[str]:
        place = self.places[name] = self.queue.place(standing, cost, int(cost))
        place.offer = lambda: self._offer(name)
        self.tasks[name] = asyncio.create_task(self._wait(name, place))
        return place

    async def let(self, room: int) -> list[str]:
        """Who goes when there is so much room."""
        before = len(self.went)
        self.room = room
        self.queue.news()
        await asyncio.sleep(0.001)
        return self.went[before:]

    def _offer(self, name: str) -> str | None:
        if self.room == 0:
            return None
        self.room -= 1
        return name

    async def _wait(self, name: str, place: Place[str]) -> None:
        with place:
            while True:
                try:
                    assert await place.turn(1000.0) == name
                    break
                except TimeoutError:
                    continue
            self.went.append(name)
            place.through()


async def come(
    line: Line, *names: str, cost: float = 1.0, standing: Standing | None = None
) -> None:
    """The first letter of a name is its tenant."""
    for name in names:
        line.come(name, standing or Standing(name[0]), cost)
    await asyncio.sleep(0.001)


@on_virtual_time
async def test_within_a_tenant_who_came_first_goes_first() -> None:
    line = Line()
    await come(line, "a1", "a2", "a3")
    assert line.queue.waiting == 3
    assert await line.let(2) == ["a1", "a2"]
    assert await line.let(5) == ["a3"]
    assert not line.queue.busy


@on_virtual_time
async def test_who_comes_while_there_is_room_does_not_wait() -> None:
    line = Line(room=2)
    await come(line, "a1", "b1", "a2")
    assert line.went == ["a1", "b1"]


@on_virtual_time
async def test_a_tenant_with_many_does_not_hold_up_one_with_a_few() -> None:
    line = Line()
    await come(line, *(f"a{number}" for number in range(10)), cost=1000.0)
    await come(line, "b1", "b2", cost=10.0)
    assert await line.let(4) == ["a0", "b1", "b2", "a1"]


@on_virtual_time
async def test_tenants_that_wait_share_by_tokens_and_not_by_requests() -> None:
    line = Line()
    await come(line, *(f"a{number}" for number in range(40)), cost=400.0)
    await come(line, *(f"b{number}" for number in range(160)), cost=100.0)
    went = Counter(name[0] for name in await line.let(50))
    assert went == {"a": 10, "b": 40}


@on_virtual_time
async def test_weights_divide_the_tokens() -> None:
    line = Line()
    heavy, light = Standing("h", weight=3.0), Standing("l", weight=1.0)
    for number in range(80):
        await come(line, f"h{number}", standing=heavy, cost=50.0)
        await come(line, f"l{number}", standing=light, cost=50.0)
    went = Counter(name[0] for name in await line.let(40))
    assert went == {"h": 30, "l": 10}


@on_virtual_time
async def test_who_was_idle_saves_nothing_up() -> None:
    line = Line()
    await come(line, *(f"a{number}" for number in range(20)), cost=10.0)
    await line.let(10)
    await come(line, *(f"b{number}" for number in range(10)), cost=10.0)
    went = Counter(name[0] for name in await line.let(10))
    assert went == {"a": 5, "b": 5}


@on_virtual_time
async def test_lower_priorities_go_first_whoever_has_them() -> None:
    line = Line()
    await come(line, "a1", "a2")
    await come(line, "b1", standing=Standing("b", priority=-1))
    await come(line, "a3", standing=Standing("a", priority=-2))
    await come(line, "c1", standing=Standing("c", priority=5))
    assert await line.let(9) == ["a3", "b1", "a1", "a2", "c1"]


@on_virtual_time
async def test_a_resumed_one_goes_before_everybody() -> None:
    line = Line(room=1)
    place = line.come("z")
    await asyncio.sleep(0.001)
    await come(line, "a1", standing=Standing("a", priority=-100))
    place.resume()
    line.tasks["z"] = asyncio.create_task(line._wait("z", place))
    await asyncio.sleep(0.001)
    assert await line.let(2) == ["z", "a1"]


@on_virtual_time
async def test_after_a_useless_offer_nobody_goes_until_there_is_news_and_then_one_at_a_time() -> (
    None
):
    queue: FairQueue[int] = FairQueue()
    places = [queue.place(A, 1.0, 1) for _ in range(4)]
    for place in places:
        place.offer = lambda: 1
    turns = [asyncio.create_task(place.turn(100.0)) for place in places[:2]]
    await asyncio.gather(*turns)  # both try what they were offered
    back = [asyncio.create_task(place.turn(100.0)) for place in (places[1], places[0])]
    await asyncio.sleep(1)
    late = asyncio.create_task(places[2].turn(100.0))
    await asyncio.sleep(1)
    assert not any(task.done() for task in (*back, late))
    queue.news()
    await asyncio.sleep(1)
    assert [task.done() for task in (*back, late)] == [False, True, False]  # who came first
    places[0].through()
    await asyncio.sleep(1)
    assert all(task.done() for task in (*back, late))
    for place in places:
        place.__exit__()
    assert not queue.busy


@on_virtual_time
async def test_giving_up_a_place_lets_others_pass_and_costs_nothing() -> None:
    line = Line()
    await come(line, "a1", "a2", cost=1000.0)
    await come(line, "b1", "b2", cost=600.0)
    line.tasks["a1"].cancel()
    await asyncio.sleep(0.001)
    assert line.queue.waiting == 3 and line.queue.waiting_cost == 2200.0
    assert await line.let(3) == ["a2", "b1", "b2"]  # a2 pays nothing for a1
    assert not line.queue.busy


@on_virtual_time
async def test_one_that_was_just_let_in_may_vanish() -> None:
    line = Line()
    await come(line, "a1", "a2")
    line.room = 1
    line.queue.news()
    line.tasks["a1"].cancel()  # before it has seen the offer
    await asyncio.sleep(0.001)
    assert await line.let(1) == ["a2"]
    assert not line.queue.busy


@on_virtual_time
async def test_what_making_an_offer_raises_is_that_requests_own() -> None:
    line = Line()
    queue = line.queue

    def broken() -> str:
        raise ValueError("too large")

    place = queue.place(A, 1.0, 1)
    place.offer = broken
    with pytest.raises(ValueError, match="too large"), place:
        await place.turn(1.0)
    await come(line, "a1")
    assert await line.let(1) == ["a1"]


@on_virtual_time
async def test_a_turn_that_does_not_come_is_a_timeout_that_keeps_the_place() -> None:
    line = Line()
    queue = line.queue
    with queue.place(A, 1.0, 1) as place:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await place.turn(5.0)
        await come(line, "a1")
        place.offer = lambda: "mine"
        line.room = 1
        queue.news()
        assert await place.turn(1.0) == "mine"
        place.through()
        await asyncio.sleep(0.001)
        assert line.went == ["a1"]


@on_virtual_time
async def test_what_it_cost_in_the_end_counts_for_the_next() -> None:
    line = Line()
    await come(line, "a1", "b1", "a2", "b2", "a3", "b3", cost=100.0)
    await line.let(2)
    line.places["a1"].settle(250.0)  # a2 has its stamp already; a3 pays
    assert await line.let(4) == ["a2", "b2", "b3", "a3"]


@on_virtual_time
async def test_what_is_ahead_of_a_newcomer_is_by_its_own_standing() -> None:
    line = Line()
    await come(line, *(f"a{number}" for number in range(10)), cost=100.0)
    assert line.queue.ahead(A) == 1000.0
    assert line.queue.ahead(Standing("a", priority=1)) == 1000.0
    assert line.queue.ahead(Standing("a", priority=-1)) == 0.0
    await line.let(1)
    assert line.queue.ahead(A) == 900.0
    assert line.queue.ahead(B) == 0.0  # stamped with the present: before a1, which is later
    await come(line, "b1", "b2", cost=150.0)
    assert line.queue.ahead(B) == 300.0 + 200.0
    assert line.queue.ahead(Standing("c", weight=0.1)) == 150.0  # b1, at the same moment


def test_who_is_said_to_be_ahead_goes_ahead() -> None:
    """Random tenants, weights and costs: `ahead` is within a request a tenant of the truth."""

    @on_virtual_time
    async def test() -> None:
        random = Random(5)
        for _ in range(30):
            line = Line()
            tenants = [Standing(name, random.choice((0.5, 1, 2))) for name in "abcd"]
            for number in range(60):
                cost = float(random.choice((10, 50, 400)))
                await come(line, f"{number}", standing=random.choice(tenants), cost=cost)
            await line.let(random.randrange(20))
            newcomer = random.choice(tenants)
            said = line.queue.ahead(newcomer)
            await come(line, "new", standing=newcomer, cost=50.0)
            rest = await line.let(100)
            went = sum(line.places[name].cost for name in rest[: rest.index("new")])
            assert abs(said - went) <= 400.0 * len(tenants)

    test()


@on_virtual_time
async def test_nothing_is_kept_of_those_who_have_gone() -> None:
    line = Line()
    random = Random(1)
    for round_ in range(50):
        for number in range(20):
            standing = Standing(f"t{random.randrange(10**9)}", priority=random.randrange(10**9))
            line.come(f"{round_}/{number}", standing)
        await asyncio.sleep(0.001)
        await line.let(random.randrange(20))
        for task in line.tasks.values():
            task.cancel()
        await asyncio.gather(*line.tasks.values(), return_exceptions=True)
    queue = line.queue
    assert not (queue._heap or queue._levels or queue.busy or queue.waiting_tokens)
    assert queue.waiting_cost == pytest.approx(0.0)


@pytest.mark.parametrize("seed", range(40))
def test_every_order_of_events_ends_with_all_served(seed: int) -> None:
    """Comings, cancels, useless offers and news in random order, then room for all."""
    random, queue = Random(seed), FairQueue[int]()
    trouble = [True]

    async def own(place: Place[int]) -> None:
        with place:
            await place.turn(1e6)
            while trouble and random.random() < 0.3:
                await asyncio.sleep(0.5)
                await place.turn(1e6)
            place.through()
            await asyncio.sleep(0.3)

    @on_virtual_time
    async def test() -> None:
        tasks: list[asyncio.Task[None]] = []
        for _ in range(60):
            action = random.random()
            if action < 0.6:
                standing = Standing(random.choice("abc"), priority=random.choice((0, 0, 1)))
                place = queue.place(standing, random.choice((1, 10, 100)), 1)
                place.offer = lambda: None if trouble and random.random() < 0.5 else 1
                if random.random() < 0.1:
                    place.served = True
                    place.resume()
                tasks.append(asyncio.create_task(own(place)))
            elif action < 0.8 and tasks:
                random.choice(tasks).cancel()
            else:
                queue.news()
            await asyncio.sleep(random.choice((0, 0, 0.1, 0.6)))
        trouble.clear()
        ended = asyncio.gather(*tasks, return_exceptions=True)
        while not ended.done():
            queue.news()
            await asyncio.sleep(0.1)
        assert not [error for error in await ended if isinstance(error, Exception)]
        assert not (queue.busy or queue._levels or queue._heap)

    test()


@on_virtual_time
async def test_what_has_waited_leaves_nothing_behind_it() -> None:
    """Sums of fractions would: a newcomer was then told to wait behind nobody."""
    queue: FairQueue[str] = FairQueue()
    room: list[str] = []
    standing = Standing("t")

    async def one(cost: float) -> None:
        with queue.place(standing, cost, 3) as place:
            place.offer = lambda: room.pop() if room else None
            await place.turn(10.0)
            place.through()

    tasks = [asyncio.create_task(one(10 + number / 7)) for number in range(50)]
    await asyncio.sleep(0.1)
    assert queue.waiting == 50 and queue.ahead(standing) > 500
    tasks.pop(20).cancel()
    room.extend("x" * 60)
    queue.news()
    await asyncio.gather(*tasks)
    assert queue.waiting == 0 == queue.waiting_cost == queue.ahead(standing)
