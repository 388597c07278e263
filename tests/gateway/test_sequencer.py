from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

import pytest

from cluster.errors import (
    BadRequest,
    BatonError,
    EngineFailed,
    NoWorkers,
    Overloaded,
    TransferFailed,
    WorkerLost,
)
from cluster.messages import (
    BOTH,
    DECODE,
    PREFILL,
    Cancel,
    Event,
    Failed,
    Generate,
    Order,
    Prefill,
    Promise,
    Request,
    Sampling,
    Start,
    Token,
)
from gateway.sequencer import Watch
from tests.gateway.scripted import Part, Scripted, landing, obliging
from tests.virtual import clock, on_virtual_time

ASK = Request("r", (1, 2, 3), Sampling(max_tokens=3))


async def collect(answer: AsyncGenerator[Token, None]) -> list[int]:
    return [token.token async for token in answer]


def ask(cluster: Scripted, request: Request = ASK) -> asyncio.Task[list[int]]:
    return asyncio.create_task(collect(cluster.sequencer.answer(request, Watch(clock()))))


def without(kind: type, part: Part = obliging) -> Part:
    """Says nothing to this kind of order."""
    return lambda order: [] if isinstance(order, kind) else part(order)


def failing(kind: type, code: str, times: int = 10**9) -> Part:
    """Fails the first orders of this kind."""
    left = [times]

    def part(order: Order) -> list[Event]:
        if isinstance(order, kind) and left[0]:
            left[0] -= 1
            return [Failed(order.request_id, order.attempt, code)]
        return list(obliging(order))

    return part


@on_virtual_time
async def test_promise_prefill_start() -> None:
    cluster = Scripted()
    cluster.pair()
    watch = Watch(clock())
    assert await collect(cluster.sequencer.answer(ASK, watch)) == [100, 101, 102]
    await asyncio.sleep(0)
    assert cluster.orders["d"] == [Promise(ASK), Start("r", 100)]
    assert cluster.orders["p"] == [Prefill(ASK, landing())]
    assert (watch.prefill_worker, watch.decode_worker, watch.cached_tokens) == ("p", "d", 3)
    assert all(member.session.requests == 0 for member in cluster.pools.members)
    assert cluster.sequencer.running == cluster.sequencer.waiting == 0


@on_virtual_time
async def test_one_token_asks_the_prefill_worker_alone() -> None:
    cluster = Scripted()
    cluster.pair()
    one = Request("r", (1, 2), Sampling(max_tokens=1))
    assert await ask(cluster, one) == [100]
    assert cluster.orders["p"][0] == Prefill(one, None)
    assert not cluster.orders["d"]


@on_virtual_time
async def test_a_first_token_that_ends_the_answer_cancels_the_landing() -> None:
    cluster = Scripted()
    cluster.pair(prefill=lambda order: [Token("r", 1, 0, 9, "stop", 9)])
    assert await ask(cluster) == [9]
    await asyncio.sleep(0.01)
    assert cluster.orders["d"] == [Promise(ASK), Cancel("r", 1)]


@on_virtual_time
async def test_an_undivided_worker_gets_it_whole() -> None:
    cluster = Scripted()
    cluster.add("b", BOTH)
    assert await ask(cluster) == [100, 101, 102]
    assert cluster.orders["b"] == [Generate(ASK)]


@on_virtual_time
async def test_a_resumed_answer_goes_on_where_the_client_is() -> None:
    cluster = Scripted()
    cluster.pair()
    resumed = Request("r", (1, 2, 100, 101), Sampling(max_tokens=5), emitted=2)
    assert await ask(cluster, resumed) == [102, 103, 104]


@on_virtual_time
async def test_events_of_another_attempt_or_out_of_order_are_nothing() -> None:
    cluster = Scripted()

    def confused(order: Order) -> list[Event]:
        if not isinstance(order, Start):
            return list(obliging(order))
        return [
            Failed("r", 0, "engine_error"),
            Token("r", 2, 1, 666),
            Token("r", 1, 0, 100),
            Token("r", 1, 1, 101),
            Token("r", 1, 1, 101),
            Token("r", 1, 2, 102, "length"),
        ]

    cluster.pair(decode=confused)
    assert await ask(cluster) == [100, 101, 102]


@on_virtual_time
async def test_a_gap_in_the_tokens_is_an_error_and_not_a_wait() -> None:
    cluster = Scripted()

    def forgetful(order: Order) -> list[Event]:
        if not isinstance(order, Start):
            return list(obliging(order))
        return [Token("r", 1, 1, 101), Token("r", 1, 3, 103)]

    cluster.pair(decode=forgetful)
    with pytest.raises(EngineFailed):
        await ask(cluster)


@pytest.mark.parametrize("silent", [Promise, Prefill, Start])
def test_closing_it_in_any_phase_cancels_on_every_worker_involved(silent: type) -> None:
    @on_virtual_time
    async def test() -> None:
        cluster = Scripted()
        cluster.pair(prefill=without(silent), decode=without(silent))
        answer = ask(cluster)
        await asyncio.sleep(1)
        answer.cancel()
        with suppress(asyncio.CancelledError):
            await answer
        await asyncio.sleep(0.01)
        assert cluster.cancels("d") == cluster.cancels("p") == [Cancel("r", 1)]
        assert all(member.session.requests == 0 for member in cluster.pools.members)
        assert cluster.sequencer.running == cluster.sequencer.waiting == 0

    test()


@on_virtual_time
async def test_closing_it_while_it_decodes_cancels_on_the_decode_worker() -> None:
    cluster = Scripted()
    cluster.pair()
    answer = cluster.sequencer.answer(ASK, Watch(clock()))
    assert [(await anext(answer)).token for _ in range(2)] == [100, 101]
    await answer.aclose()
    await asyncio.sleep(0.01)
    assert cluster.cancels("d") == [Cancel("r", 1)]
    assert not cluster.cancels("p")  # it had done its part


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("too_large", BadRequest),
        ("transfer_failed", TransferFailed),
        ("lease_expired", TransferFailed),
        ("engine_error", EngineFailed),
        ("wrong_role", EngineFailed),
    ],
)
@pytest.mark.parametrize("kind", [Promise, Prefill, Start])
def test_failures_have_types(kind: type, code: str, error: type[BatonError]) -> None:
    @on_virtual_time
    async def test() -> None:
        cluster = Scripted()
        cluster.pair(prefill=failing(kind, code), decode=failing(kind, code))
        with pytest.raises(error):
            await ask(cluster)
        await asyncio.sleep(0.01)
        assert cluster.cancels("d") == cluster.cancels("p") == [Cancel("r", 1)]

    test()


@pytest.mark.parametrize("code", ["full", "draining"])
def test_who_is_refused_goes_to_another_worker_with_a_new_attempt(code: str) -> None:
    @on_virtual_time
    async def test() -> None:
        cluster = Scripted()
        cluster.pair(decode=failing(Promise, code))
        cluster.add("e", DECODE)  # the second choice: ties go by name
        assert await ask(cluster) == [100, 101, 102]
        await asyncio.sleep(0.01)
        assert cluster.orders["d"] == [Promise(ASK), Cancel("r", 1)]
        assert cluster.orders["e"] == [Promise(ASK, 2), Start("r", 100, 2)]
        assert cluster.orders["p"][-1] == Prefill(ASK, landing(), 2)

    test()


@on_virtual_time
async def test_who_is_refused_everywhere_waits_for_news() -> None:
    cluster = Scripted()
    _, decode = cluster.pair(decode=failing(Promise, "full", times=2))
    answer = ask(cluster)
    await asyncio.sleep(5)
    assert not answer.done()
    for _ in range(3):
        cluster.beat(decode)
        await asyncio.sleep(0.1)
    assert await answer == [100, 101, 102]


@on_virtual_time
async def test_who_waits_too_long_is_told_to_come_back() -> None:
    cluster = Scripted(queue_timeout=3.0)
    _, decode = cluster.pair(decode=failing(Promise, "full"))
    answers = [ask(cluster), ask(cluster, Request("other", (1,)))]
    for _ in range(40):
        cluster.beat(decode)
        await asyncio.sleep(0.1)
    for answer in answers:
        with pytest.raises(Overloaded, match="in time"):
            await answer
    assert cluster.sequencer.waiting == 0


@on_virtual_time
async def test_those_who_wait_are_served_in_their_order() -> None:
    cluster = Scripted()
    room: set[str] = set()

    def part(order: Order) -> list[Event]:
        if isinstance(order, Promise) and order.request_id not in room:
            return [Failed(order.request_id, order.attempt, "full")]
        return list(obliging(order))

    _, decode = cluster.pair(decode=part)
    names = ["a", "b", "c"]
    done: list[str] = []
    tasks = []
    for name in names:
        task = ask(cluster, Request(name, (1, 2), Sampling(max_tokens=3)))
        task.add_done_callback(lambda _, name=name: done.append(name))
        tasks.append(task)
        await asyncio.sleep(0.1)
    room.update(names)
    for _ in range(6):
        cluster.beat(decode)
        await asyncio.sleep(0.1)
    await asyncio.gather(*tasks)
    assert done == names


@on_virtual_time
async def test_a_cancelled_one_lets_the_next_in() -> None:
    cluster = Scripted()
    _, decode = cluster.pair(decode=failing(Promise, "full", times=2))
    first, second = ask(cluster), ask(cluster, Request("b", (1,), Sampling(max_tokens=3)))
    await asyncio.sleep(1)
    first.cancel()
    await asyncio.sleep(0)
    for _ in range(4):
        cluster.beat(decode)
        await asyncio.sleep(0.1)
    assert await second == [100, 101, 102]


@on_virtual_time
async def test_too_many_waiting_are_turned_away_at_once() -> None:
    cluster = Scripted(max_waiting=1)
    cluster.pair(prefill=without(Prefill))
    waiting = ask(cluster)
    await asyncio.sleep(0.1)
    with pytest.raises(Overloaded):
        await ask(cluster, Request("other", (1,)))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert cluster.sequencer.waiting == 0


@on_virtual_time
async def test_without_workers_it_says_so_at_once() -> None:
    cluster = Scripted()
    with pytest.raises(NoWorkers):
        await ask(cluster)
    cluster.add("p", PREFILL)
    with pytest.raises(NoWorkers):
        await ask(cluster)


@pytest.mark.parametrize(("silent", "lost"), [(Promise, "d"), (Prefill, "p"), (Start, "d")])
def test_a_lost_worker_ends_what_it_held(silent: type, lost: str) -> None:
    @on_virtual_time
    async def test() -> None:
        cluster = Scripted()
        cluster.pair(prefill=without(silent), decode=without(silent))
        answer = ask(cluster)
        await asyncio.sleep(1)
        cluster.hang_up(lost)
        with pytest.raises(WorkerLost):
            await answer
        await asyncio.sleep(0.01)
        other = {"d": "p", "p": "d"}[lost]
        assert cluster.cancels(other) == [Cancel("r", 1)]

    test()


@on_virtual_time
async def test_a_prefill_worker_may_go_once_it_has_done_its_part() -> None:
    cluster = Scripted()
    part = without(Start)
    cluster.pair(decode=part)
    answer = ask(cluster)
    await asyncio.sleep(1)
    cluster.say("d", Token("r", 1, 1, 101))
    await asyncio.sleep(1)
    cluster.hang_up("p")
    await asyncio.sleep(1)
    cluster.say("d", Token("r", 1, 2, 102, "length"))
    assert await answer == [100, 101, 102]


@on_virtual_time
async def test_spans_add_up_to_what_passed_on_our_clock() -> None:
    cluster = Scripted()

    def part(order: Order) -> list[Event]:
        spans = (("prefill_queue", 0.25), ("prefill", 0.5)) if isinstance(order, Prefill) else ()
        return [
            Token(e.request_id, e.attempt, e.index, e.token, spans=spans)
            if isinstance(e, Token) and spans
            else e
            for e in obliging(order)
        ]

    cluster.pair(prefill=without(Prefill), decode=part)
    watch = Watch(clock() - 2.0)
    answer = cluster.sequencer.answer(ASK, watch)
    first = asyncio.create_task(anext(answer))
    await asyncio.sleep(1)
    cluster.say("p", *part(Prefill(ASK, None)))
    await first
    assert watch.spans == pytest.approx(
        {"queue": 2.0, "landing": 0.0, "prefill_queue": 0.25, "prefill": 0.5, "wire": 0.25}
    )
    await answer.aclose()
