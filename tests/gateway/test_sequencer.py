from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace

import pytest

from cluster.errors import (
    BadRequest,
    EngineFailed,
    NoWorkers,
    Overloaded,
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
    Load,
    Order,
    Prefill,
    Promise,
    Request,
    Sampling,
    Start,
    Token,
)
from gateway.relay import Recovery, Watch
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


@pytest.mark.parametrize("kind", [Promise, Prefill])
def test_what_fits_nowhere_is_a_bad_request(kind: type) -> None:
    @on_virtual_time
    async def test() -> None:
        cluster = Scripted()
        cluster.pair(prefill=failing(kind, "too_large"), decode=failing(kind, "too_large"))
        with pytest.raises(BadRequest):
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
async def test_without_workers_it_waits_a_little_and_says_so() -> None:
    cluster = Scripted()
    for _ in range(2):
        began = clock()
        with pytest.raises(NoWorkers) as error:
            await ask(cluster)
        assert clock() - began == 5.0 and error.value.retry_after
        cluster.add("p", PREFILL)  # alone it can read, not write


@on_virtual_time
async def test_who_comes_while_nobody_is_there_is_served_when_somebody_comes() -> None:
    cluster = Scripted()
    answer = ask(cluster)
    await asyncio.sleep(4.9)
    cluster.pair()
    assert await answer == [100, 101, 102]


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


# Losses. Workers of these tests say of an answer what `until` allows, and are then cut off.

LONG = Request("r", (1, 2, 3), Sampling(max_tokens=8))
WHOLE = list(range(100, 108))


def up_to(last: int, asked: Request = LONG) -> Part:
    """Tokens up to index `last`, and then none."""

    def part(order: Order) -> list[Event]:
        if isinstance(order, Start):
            begin = order.first_token - 100 + 1
            return [
                Token(asked.id, order.attempt, i, 100 + i, "length" if i == 7 else "")
                for i in range(begin, last + 1)
            ]
        if isinstance(order, Generate):
            return [e for e in obliging(order) if isinstance(e, Token) and e.index <= last]
        return list(obliging(order))

    return part


def resumed(emitted: int, asked: Request = LONG) -> Request:
    return replace(asked, tokens=(*asked.tokens, *range(100, 100 + emitted)), emitted=emitted)


def watched(cluster: Scripted, request: Request = LONG) -> tuple[Watch, asyncio.Task[list[int]]]:
    watch = Watch(clock())
    return watch, asyncio.create_task(collect(cluster.sequencer.answer(request, watch)))


async def settled(cluster: Scripted) -> None:
    """After an answer's end: nobody is involved any more."""
    await asyncio.sleep(0.01)
    assert all(member.session.requests == 0 for member in cluster.pools.members)
    assert cluster.sequencer.running == cluster.sequencer.waiting == 0


@on_virtual_time
async def test_a_lost_decode_worker_is_replaced_and_the_answer_goes_on() -> None:
    told: list[Recovery] = []
    cluster = Scripted(recovered=told.append)
    cluster.pair(decode=up_to(4))
    cluster.add("e", DECODE, up_to(7))
    watch, answer = watched(cluster)
    await asyncio.sleep(1)
    cluster.hang_up("d")
    assert await answer == WHOLE
    await settled(cluster)
    assert cluster.orders["e"] == [Promise(resumed(5), 2), Start("r", 105, 2)]
    assert cluster.orders["p"] == [
        Prefill(LONG, landing()),
        Prefill(resumed(5), landing(), 2),
    ]
    assert (watch.prefill_worker, watch.decode_worker) == ("p", "e")
    assert told == watch.recoveries == [Recovery("decoding", "died", told[0].seconds)]


@on_virtual_time
async def test_a_prefill_worker_lost_before_its_token_is_replaced_at_the_same_landing() -> None:
    cluster = Scripted()
    cluster.pair(prefill=without(Prefill), decode=up_to(7))
    cluster.add("e", DECODE)
    watch, answer = watched(cluster)
    await asyncio.sleep(2)
    cluster.add("q", PREFILL)
    cluster.hang_up("p")
    assert await answer == WHOLE
    await settled(cluster)
    assert cluster.orders["d"] == [Promise(LONG), Promise(LONG, 2), Start("r", 100, 2)]
    assert cluster.orders["q"] == [Prefill(LONG, landing(), 2)] and not cluster.orders["e"]
    assert watch.recoveries == [Recovery("prefilling", "died", watch.recoveries[0].seconds)]
    assert watch.spans["recovery"] == pytest.approx(2.0)
    assert sum(watch.spans[p] for p in ("recovery", "queue", "landing", "wire")) == pytest.approx(
        clock() - watch.arrived, abs=0.02
    )


@on_virtual_time
async def test_without_another_prefill_worker_its_landing_becomes_a_prompt() -> None:
    cluster = Scripted()
    cluster.pair(prefill=without(Prefill), decode=up_to(7))
    watch, answer = watched(cluster)
    await asyncio.sleep(1)
    cluster.hang_up("p")
    assert await answer == WHOLE and watch.fallback
    assert cluster.orders["d"] == [Promise(LONG), Generate(LONG, 2)]


@on_virtual_time
async def test_a_kept_landing_whose_worker_goes_too_is_made_elsewhere() -> None:
    cluster = Scripted()
    _, decode = cluster.pair(prefill=without(Prefill))
    answer = ask(cluster, LONG)
    await asyncio.sleep(1)
    cluster.pools.report(decode, Load(1, draining=True))
    cluster.add("q", PREFILL)
    cluster.add("e", DECODE, up_to(7))
    cluster.hang_up("p")
    assert await answer == WHOLE
    await settled(cluster)
    assert cluster.cancels("d") == [Cancel("r", 1)]
    assert cluster.kinds("e") == ["Promise", "Start"]


@on_virtual_time
async def test_a_prefill_worker_lost_in_the_handoff_costs_nothing_if_all_had_arrived() -> None:
    cluster = Scripted()
    cluster.pair(decode=without(Start))
    watch, answer = watched(cluster, ASK)
    await asyncio.sleep(1)
    cluster.hang_up("p")
    await asyncio.sleep(0.4)
    cluster.say("d", Token("r", 1, 1, 101), Token("r", 1, 2, 102, "length"))
    assert await answer == [100, 101, 102] and not watch.recoveries


@on_virtual_time
async def test_a_prefill_worker_lost_in_the_handoff_is_replaced() -> None:
    cluster = Scripted()
    cluster.pair(decode=without(Start))
    cluster.add("q", PREFILL)
    cluster.add("e", DECODE, up_to(7))
    watch, answer = watched(cluster)
    await asyncio.sleep(1)
    cluster.hang_up("p")
    await asyncio.sleep(1)
    cluster.hang_up("d") if not answer.done() else None
    assert await answer == WHOLE
    assert watch.recoveries[0].phase == "handing_off"


@on_virtual_time
async def test_a_gap_in_the_tokens_is_filled() -> None:
    cluster = Scripted()

    def forgetful(order: Order) -> list[Event]:
        events = up_to(7)(order)
        if isinstance(order, Start) and order.attempt == 1:
            return [e for e in events if isinstance(e, Token) and e.index != 3]
        return events

    cluster.pair(decode=forgetful)
    watch, answer = watched(cluster)
    assert await answer == WHOLE
    assert [loss.cause for loss in watch.recoveries] == ["gap"]
    assert cluster.orders["d"][2:4] == [Cancel("r", 1), Promise(resumed(3), 2)]


@on_virtual_time
async def test_what_an_older_attempt_says_is_nothing() -> None:
    cluster = Scripted()

    def zombie(order: Order) -> list[Event]:
        if isinstance(order, Start):
            stale = [Token("r", order.attempt - 1, i, 666) for i in range(9)]
            return [*stale, Failed("r", order.attempt - 1, "engine_error"), *up_to(7)(order)]
        return list(obliging(order))

    cluster.pair(decode=up_to(2))
    cluster.add("e", DECODE, zombie)
    answer = ask(cluster, LONG)
    await asyncio.sleep(1)
    cluster.hang_up("d")
    assert await answer == WHOLE


@pytest.mark.parametrize("code", ["transfer_failed", "lease_expired"])
def test_a_pair_that_failed_is_not_used_together_for_a_while(code: str) -> None:
    @on_virtual_time
    async def test() -> None:
        cluster = Scripted()
        cluster.pair(prefill=failing(Prefill, code), decode=up_to(7))
        cluster.add("e", DECODE, up_to(7))
        watch, answer = watched(cluster)
        assert await answer == WHOLE
        assert [loss.cause for loss in watch.recoveries] == ["transfer", "transfer"]
        assert cluster.kinds("d").count("Promise") == cluster.kinds("e").count("Promise") == 1
        assert watch.fallback  # there was no other pair

    test()


@on_virtual_time
async def test_a_shunned_pair_has_another_chance_later() -> None:
    cluster = Scripted()
    cluster.pair(prefill=failing(Prefill, "transfer_failed", times=1), decode=up_to(7))
    watching = asyncio.create_task(cluster.pools.watch())
    watch, answer = watched(cluster)
    assert await answer == WHOLE and watch.fallback
    for _ in range(25):
        for member in cluster.pools.members:
            cluster.pools.report(member, Load(round(clock() * 100)))
        await asyncio.sleep(0.25)
    watch, answer = watched(cluster, replace(LONG, id="later"))
    cluster.parts["d"] = up_to(7, replace(LONG, id="later"))
    assert await answer == WHOLE and not watch.fallback
    watching.cancel()


@on_virtual_time
async def test_a_step_that_raises_is_tried_once_more_and_elsewhere() -> None:
    cluster = Scripted()
    cluster.pair(decode=failing(Start, "engine_error"))
    cluster.add("e", DECODE, up_to(7))
    watch, answer = watched(cluster)
    assert await answer == WHOLE
    assert [(loss.phase, loss.cause) for loss in watch.recoveries] == [("handing_off", "engine")]


@on_virtual_time
async def test_where_there_is_one_worker_it_has_a_second_chance() -> None:
    cluster = Scripted()
    cluster.pair(prefill=failing(Prefill, "engine_error", times=1), decode=up_to(7))
    assert await ask(cluster, LONG) == WHOLE


@on_virtual_time
async def test_who_two_workers_died_of_gets_no_third() -> None:
    cluster = Scripted()
    cluster.add("p", PREFILL)
    for name in ("d", "e", "f"):
        cluster.add(name, DECODE, up_to(2))
    answer = ask(cluster, LONG)
    for name in ("d", "e"):
        await asyncio.sleep(1)
        cluster.hang_up(name)
    with pytest.raises(EngineFailed):
        await answer
    await settled(cluster)
    assert not cluster.orders["f"]


@on_virtual_time
async def test_decode_workers_that_die_while_a_prompt_is_read_elsewhere_did_not_die_of_it() -> None:
    cluster = Scripted()
    cluster.pair(prefill=without(Prefill))
    cluster.add("e", DECODE)
    watch, answer = watched(cluster)
    await asyncio.sleep(1)
    cluster.hang_up("d")
    await asyncio.sleep(1)
    assert not any(member.suspects for member in cluster.pools.members)
    cluster.parts["p"] = obliging
    cluster.add("f", DECODE, up_to(7))
    cluster.hang_up("e")
    assert await answer == WHOLE
    assert [(loss.phase, loss.cause) for loss in watch.recoveries] == [("prefilling", "died")] * 2


@on_virtual_time
async def test_a_client_is_not_blamed_for_the_loss_of_the_only_worker_with_room() -> None:
    cluster = Scripted()
    cluster.add("p", PREFILL)
    cluster.add("large", DECODE, up_to(4))
    cluster.add("small", DECODE, blocks=0)
    answer = ask(cluster, LONG)
    await asyncio.sleep(1)
    cluster.hang_up("large")
    with pytest.raises(NoWorkers):
        await answer
    await settled(cluster)


@on_virtual_time
async def test_suspects_are_kept_apart_while_there_are_workers_for_it() -> None:
    cluster = Scripted()
    cluster.add("p", PREFILL)
    cluster.add("d", DECODE, without(Start))
    asked = [replace(LONG, id=name) for name in ("r", "s", "t")]
    answers = [ask(cluster, request) for request in asked]
    await asyncio.sleep(1)
    others = [cluster.add(name, DECODE, without(Start)) for name in ("e", "f")]
    cluster.hang_up("d")
    await asyncio.sleep(1)
    assert sorted(len(member.suspects) for member in others) == [1, 2]
    prefill = cluster.pools.members[0]
    assert prefill.suspects == {"r", "s", "t"}  # there is one
    for answer in answers:
        answer.cancel()
    await asyncio.gather(*answers, return_exceptions=True)
    assert not any(member.suspects for member in cluster.pools.members)


@on_virtual_time
async def test_the_third_loss_is_the_end() -> None:
    cluster = Scripted()
    cluster.add("p", PREFILL)
    members = [cluster.add(name, DECODE, up_to(2)) for name in ("d", "e", "f", "g")]
    watch, answer = watched(cluster)
    for member in members[:3]:
        await asyncio.sleep(1)
        cluster.pools.leave(member, "silent")
    with pytest.raises(WorkerLost):
        await answer
    await settled(cluster)
    assert not cluster.orders["g"] and len(watch.recoveries) == 2


@on_virtual_time
async def test_what_a_draining_worker_gives_back_moves_as_often_as_it_must() -> None:
    cluster = Scripted()
    cluster.add("p", PREFILL)
    members = [cluster.add(name, DECODE, up_to(last)) for last, name in enumerate("defg", 2)]
    cluster.add("h", DECODE, up_to(7))
    watch, answer = watched(cluster)
    for attempt, member in enumerate(members, 1):
        await asyncio.sleep(1)
        cluster.pools.report(member, Load(1, draining=True))
        cluster.say(member.peer.name, Failed("r", attempt, "given_back"))
    assert await answer == WHOLE
    assert {loss.cause for loss in watch.recoveries} == {"drained"} and len(watch.recoveries) == 4


@on_virtual_time
async def test_a_landing_given_back_is_not_the_prefill_workers_fault() -> None:
    cluster, slow = Scripted(), [True]

    def prefill(order: Order) -> list[Event]:
        return [] if isinstance(order, Prefill) and slow.pop() else obliging(order)

    cluster.add("p", PREFILL, prefill)
    first, _ = cluster.add("d", DECODE), cluster.add("e", DECODE, up_to(7))
    watch, answer = watched(cluster)
    await asyncio.sleep(1)
    slow += [False]
    cluster.pools.report(first, Load(1, draining=True))
    cluster.say("d", Failed("r", 1, "given_back"))
    assert await answer == WHOLE
    assert [(loss.phase, loss.cause) for loss in watch.recoveries] == [("prefilling", "drained")]
    assert (watch.prefill_worker, watch.decode_worker, watch.fallback) == ("p", "e", False)


@on_virtual_time
async def test_who_waits_after_a_refusal_holds_no_landing() -> None:
    cluster = Scripted()
    _, decode = cluster.pair(prefill=without(Prefill))
    answer = ask(cluster)
    await asyncio.sleep(1)
    cluster.pools.report(decode, Load(1, draining=True))  # nor does it read the prompt itself
    cluster.say("p", Failed("r", 1, "draining"))
    await asyncio.sleep(0.1)
    assert cluster.cancels("d") == [Cancel("r", 1)]
    assert all(member.session.requests == 0 for member in cluster.pools.members)
    answer.cancel()
    with suppress(asyncio.CancelledError):
        await answer


@on_virtual_time
async def test_the_last_token_alone_needs_no_decode_worker() -> None:
    cluster = Scripted()
    cluster.pair(decode=up_to(6))
    answer = ask(cluster, LONG)
    await asyncio.sleep(1)
    cluster.hang_up("d")
    assert await answer == WHOLE
    assert Prefill(resumed(7), None, 2) in cluster.orders["p"]


@on_virtual_time
async def test_who_was_lost_waits_for_nobodys_turn() -> None:
    cluster = Scripted()
    cluster.pair(decode=up_to(4))
    cluster.add("e", DECODE, failing(Promise, "full"))
    answer = ask(cluster, LONG)
    await asyncio.sleep(1)
    waiting = [ask(cluster, Request(f"w{n}", (1,), Sampling(max_tokens=3))) for n in range(3)]
    await asyncio.sleep(1)
    cluster.hang_up("d")
    await asyncio.sleep(1)
    cluster.parts["e"] = lambda order: (
        up_to(7)(order) if getattr(order, "request", LONG).id == "r" else []
    )
    cluster.beat(cluster.pools.members[-1])
    assert await answer == WHOLE
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@on_virtual_time
async def test_a_cancel_between_two_attempts_leaves_nothing() -> None:
    cluster = Scripted()
    cluster.pair(decode=up_to(4))
    answer = cluster.sequencer.answer(LONG, Watch(clock()))
    for _ in range(5):
        await anext(answer)
    cluster.hang_up("d")
    waiting = asyncio.create_task(anext(answer))
    await asyncio.sleep(1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await answer.aclose()
    await settled(cluster)


@on_virtual_time
async def test_without_a_prefill_worker_a_decode_worker_reads_by_itself() -> None:
    fallen = []
    cluster = Scripted(fell_back=lambda: fallen.append(1))
    cluster.add("d", DECODE)
    watch, answer = watched(cluster, ASK)
    assert await answer == [100, 101, 102]
    assert watch.fallback and fallen == [1]
    assert cluster.orders["d"] == [Generate(ASK)]
    cluster.add("p", PREFILL)
    watch, answer = watched(cluster, replace(ASK, id="s"))
    assert await answer == [100, 101, 102] and not watch.fallback
