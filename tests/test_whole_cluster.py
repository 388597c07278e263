"""The whole cluster on virtual time. Every step of every worker is held to the block ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from cluster import metrics
from cluster.errors import (
    BadRequest,
    BatonError,
    EngineFailed,
    NoWorkers,
    Overloaded,
)
from cluster.messages import (
    BOTH,
    DECODE,
    PREFILL,
    Cancel,
    Generate,
    Prefill,
    Promise,
    Report,
    Request,
    Start,
)
from cluster.orders import Ordered
from gateway.relay import Watch
from kvtransfer.frames import Ack, Chunk, Greeting, Manifest, Renew, Sealed, Welcome
from tests.cluster_in_process import Cluster
from tests.hash_model import ask_for, expected
from tests.ledger import check_ledger
from tests.virtual import clock, on_virtual_time, run

MS = 0.001


@pytest.fixture(autouse=True, params=[False, True], ids=["in step", "a step ahead"])
def _ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "ahead", request.param)


# The test bed itself: it must see what it is there to see.


@pytest.mark.parametrize("slot", [0, 7, 29])
def test_one_wrong_value_of_kv_is_seen(slot: int) -> None:
    async def main() -> None:
        async with Cluster() as cluster:
            _, decode = await cluster.pair()
            answer = cluster.sequencer.answer(ask_for("a", 30), Watch())
            await anext(answer)
            await anext(answer)
            (sequence,) = decode.stage._running  # type: ignore[attr-defined]
            wrong = decode.cache.slots_of(sequence.blocks, slot, slot + 1)
            decode.cache.keys(0)[wrong] += 1
            token = await anext(answer)
            assert token.token != expected(ask_for("a", 30))[2]
            assert decode.runner.faults
            decode.runner.faults.clear()
            await answer.aclose()

    run(main())


@on_virtual_time
async def test_a_block_that_nobody_answers_for_is_seen() -> None:
    async with Cluster() as cluster:
        _, decode = await cluster.pair()
        for leak in (decode.pool.take, decode.pool.promise):
            blocks = leak(1)
            with pytest.raises(AssertionError, match="other than those"):
                check_ledger(decode)
            with pytest.raises(AssertionError, match="still held"):
                await cluster.idle(within=0.1)
            (decode.pool.release if leak == decode.pool.take else decode.pool.revoke)(blocks)


# Answers.


@on_virtual_time
async def test_one_request_through_a_pair() -> None:
    async with Cluster() as cluster:
        prefill, decode = await cluster.pair()
        watch = await cluster.check(ask_for("a", 30, max_tokens=20))
        assert (watch.prefill_worker, watch.decode_worker) == ("p", "d")
        assert prefill.runner.steps == [(16,), (14,)]  # the budget is 16
        assert decode.runner.steps == [(1,)] * 19
        assert decode.landings.counters["bytes"] == 30 * prefill.cache.token_bytes(
            range(2)
        ) + 30 * prefill.cache.token_bytes(range(2, 3))
        await cluster.idle(within=0.1)


@pytest.mark.parametrize("sizes", [(16, 64), (64, 16), (16, 16), (1, 7), (7, 3), (5, 1)])
def test_block_sizes_may_differ(sizes: tuple[int, int]) -> None:
    async def main() -> None:
        async with Cluster() as cluster:
            cluster.add(PREFILL, "p", block_size=sizes[0], blocks=600 // sizes[0], budget=50)
            cluster.add(DECODE, "d", block_size=sizes[1], blocks=600 // sizes[1])
            await cluster.joined(2)
            shared = ask_for("a", 70)
            for request in (
                *(ask_for(f"{length}", length) for length in (1, 15, 16, 17, 63, 64, 65, 130)),
                shared,
                replace(shared, id="again"),
                replace(shared, id="longer", tokens=(*shared.tokens, 1, 2, 3)),
                replace(shared, id="shorter", tokens=shared.tokens[:64]),
            ):
                await cluster.check(request)
            await cluster.idle(within=0.1)

    run(main())


@on_virtual_time
async def test_many_at_once_each_get_their_own_answer() -> None:
    async with Cluster(seed=3) as cluster:
        cluster.add(PREFILL, "p0", blocks=96)
        cluster.add(PREFILL, "p1", blocks=96, block_size=3)
        cluster.add(DECODE, "d0", blocks=200)
        cluster.add(DECODE, "d1", blocks=200, block_size=5)
        await cluster.joined(4)
        watches = await asyncio.gather(
            *(cluster.check(ask_for(f"r{number}", 1 + number)) for number in range(40))
        )
        assert {watch.prefill_worker for watch in watches} == {"p0", "p1"}
        assert {watch.decode_worker for watch in watches} == {"d0", "d1"}
        await cluster.idle(within=0.1)


@on_virtual_time
async def test_prefix_caches_change_nothing_but_the_work() -> None:
    async with Cluster() as cluster:
        prefill, decode = await cluster.pair()
        first = ask_for("first", 41)
        await cluster.check(first)
        sent = decode.landings.counters["bytes"]
        watch = await cluster.check(replace(first, id="second"))
        assert watch.cached_tokens == 40
        assert decode.landings.counters["bytes"] - sent == sent / 41  # the last token alone
        salted = await cluster.check(replace(first, id="salted", salt=b"another tenant"))
        assert salted.cached_tokens == 0
        assert prefill.runner.steps[3:] == [(1,), (16,), (16,), (9,)]
        await cluster.idle(within=0.1)


@on_virtual_time
async def test_nothing_is_sent_of_a_prompt_that_the_decoder_has_whole() -> None:
    async with Cluster() as cluster:
        _, decode = await cluster.pair(block_size=4)
        request = ask_for("first", 32)
        await cluster.check(request)
        sent = decode.landings.counters["bytes"]
        watch = await cluster.check(replace(request, id="second"))
        assert watch.cached_tokens == 28  # prefill computes a block for the sake of the last token
        assert decode.landings.counters["bytes"] == sent
        await cluster.idle(within=0.1)


@on_virtual_time
async def test_without_caches_the_answers_are_the_same() -> None:
    async with Cluster() as cluster:
        await cluster.pair(caching=False)
        request = ask_for("first", 32)
        for name in ("a", "b"):
            assert (await cluster.check(replace(request, id=name))).cached_tokens == 0
        assert all(worker.pool.counts().cached == 0 for worker in cluster.workers)
        await cluster.idle(within=0.1)


@on_virtual_time
async def test_an_undivided_worker_mixes_prompts_and_answers_in_one_step() -> None:
    async with Cluster() as cluster:
        both = await cluster.undivided(blocks=200)
        await asyncio.gather(
            *(cluster.check(ask_for(f"r{number}", 5 * number + 1)) for number in range(12))
        )
        assert any(1 in step and max(step) > 1 for step in both.runner.steps)
        assert max(map(sum, both.runner.steps)) <= 16
        again = await cluster.check(ask_for("r9", 46))
        assert again.cached_tokens == 44
        await cluster.idle(within=0.1)


@on_virtual_time
async def test_a_pair_is_preferred_and_an_undivided_worker_takes_what_it_refuses() -> None:
    async with Cluster() as cluster:
        await cluster.pair(blocks=12)
        await cluster.undivided(blocks=12)
        watches = await asyncio.gather(
            *(cluster.check(ask_for(f"r{number}", 20)) for number in range(4))
        )
        assert {watch.decode_worker for watch in watches} == {"d", "b"}


@on_virtual_time
async def test_one_token_needs_no_decoder() -> None:
    async with Cluster() as cluster:
        cluster.add(PREFILL, "p")
        await cluster.joined(1)
        tokens = await cluster.ask(ask_for("a", 9, max_tokens=1))
        assert [token.finish for token in tokens] == ["length"]
        with pytest.raises(NoWorkers):
            await cluster.ask(ask_for("b", 9, max_tokens=2))
        await cluster.idle(within=0.1)


@pytest.mark.parametrize("last", [0, 1, 5])
def test_a_stop_token_may_come_at_any_place(last: int) -> None:
    async def main() -> None:
        async with Cluster() as cluster:
            await cluster.pair()
            request = ask_for("a", 21)
            stop = expected(request)[last]
            stopped = ask_for("a", 21, stop_token_ids=(stop,))
            tokens = await cluster.ask(stopped)
            assert [token.token for token in tokens] == expected(stopped)
            assert len(tokens) == last + 1
            assert (tokens[-1].finish, tokens[-1].stop_token) == ("stop", stop)
            await cluster.idle(within=0.1)  # a landing that nobody starts included

    run(main())


@on_virtual_time
async def test_the_timeline_adds_up() -> None:
    async with Cluster() as cluster:
        await cluster.pair()
        watch = Watch(arrived=clock())
        began = clock()
        times = [clock() async for _ in cluster.sequencer.answer(ask_for("a", 40), watch)]
        before = ("queue", "landing", "prefill_queue", "prefill", "wire")
        between = ("transfer_tail", "decode_admit", "first_step", "wire_second")
        assert sum(watch.spans[name] for name in before) == pytest.approx(times[0] - began)
        assert sum(watch.spans[name] for name in between) == pytest.approx(times[1] - times[0])
        assert set(watch.spans) == {*before, *between}


# Pressure.


@on_virtual_time
async def test_a_full_decoder_holds_requests_back_until_all_are_answered() -> None:
    async with Cluster() as cluster:
        cluster.add(PREFILL, "p", blocks=64)
        decode = cluster.add(DECODE, "d", blocks=12)
        await cluster.joined(2)
        await asyncio.gather(*(cluster.check(ask_for(f"r{number}", 20)) for number in range(10)))
        assert max(map(len, decode.runner.steps)) <= 2
        await cluster.idle(within=0.1)


@on_virtual_time
async def test_seats_hold_requests_back_too() -> None:
    async with Cluster() as cluster:
        _, decode = await cluster.pair(blocks=500, max_sequences=3)
        await asyncio.gather(*(cluster.check(ask_for(f"r{number}", 20)) for number in range(10)))
        assert max(map(len, decode.runner.steps)) <= 3


@on_virtual_time
async def test_a_prompt_may_wait_for_its_prefill_longer_than_its_lease() -> None:
    async with Cluster() as cluster:
        cluster.add(PREFILL, "p", blocks=5, step_s=0.5)
        decode = cluster.add(DECODE, "d", blocks=500, lease=3)
        await cluster.joined(2)
        began = clock()
        await asyncio.gather(*(cluster.check(ask_for(f"r{number}", 16)) for number in range(20)))
        assert clock() - began > 9
        assert decode.landings.counters["expired"] == 0


@pytest.mark.parametrize("role", [DECODE, BOTH])
def test_the_evicted_are_recomputed_and_nobody_notices(role: str) -> None:
    async def main() -> None:
        async with Cluster() as cluster:
            cluster.add(role, "w", blocks=16)
            if role == DECODE:
                cluster.add(PREFILL, "p")
            await cluster.joined(1 + (role == DECODE))
            worker = next(worker for worker in cluster.workers if worker.role == role)
            await asyncio.gather(
                *(cluster.check(ask_for(f"r{number}", 12, max_tokens=40)) for number in range(4))
            )
            assert dict(worker.service.load.counters)[metrics.PREEMPTIONS] > 0
            await cluster.idle(within=0.5)

    run(main())


@on_virtual_time
async def test_the_evicted_are_not_starved_by_newcomers() -> None:
    async with Cluster() as cluster:
        cluster.add(PREFILL, "p", blocks=200)
        decode = cluster.add(DECODE, "d", blocks=24, step_s=0.05)
        await cluster.joined(2)
        answered: list[str] = []

        async def ask(name: str, prompt: int, max_tokens: int) -> None:
            await cluster.check(ask_for(name, prompt, max_tokens))
            answered.append(name)

        async with asyncio.TaskGroup() as asking:
            asking.create_task(ask("old", 16, 60))
            asking.create_task(ask("young", 40, 50))
            for number in range(50):
                await asyncio.sleep(0.02)
                asking.create_task(ask(f"late{number}", 12, 20))
        assert dict(decode.service.load.counters)[metrics.PREEMPTIONS] > 0
        assert answered.index("young") < 10


@on_virtual_time
async def test_what_never_fits_is_refused_at_once() -> None:
    async with Cluster() as cluster:
        await cluster.pair(blocks=8)
        with pytest.raises(BadRequest):
            await cluster.ask(ask_for("a", 20, max_tokens=14))
        await cluster.check(ask_for("b", 20, max_tokens=13))


@on_virtual_time
async def test_what_fits_one_worker_goes_there_however_busy_it_is() -> None:
    async with Cluster() as cluster:
        cluster.add(PREFILL, "p")
        cluster.add(DECODE, "large", blocks=64)
        cluster.add(DECODE, "small", blocks=8)
        await cluster.joined(3)
        assert cluster.pools.capacity() == 64 * 4
        busy = [asyncio.create_task(cluster.check(ask_for(f"{n}", 40, 20))) for n in range(3)]
        watch = Watch(arrived=clock())
        await cluster.ask(ask_for("a", 70), watch)
        assert watch.decode_worker == "large"
        await asyncio.gather(*busy)


@on_virtual_time
async def test_a_prefix_in_use_costs_the_next_one_no_room() -> None:
    async with Cluster() as cluster:
        await cluster.pair(blocks=24)
        first = ask_for("a", 64, max_tokens=12)
        held = asyncio.create_task(cluster.check(first))
        await asyncio.sleep(0.1)
        again = Request("b", first.tokens, replace(first.sampling, max_tokens=2))
        await cluster.check(again)
        assert not held.done()
        await held


@on_virtual_time
async def test_a_client_that_reads_slowly_holds_up_only_itself() -> None:
    async with Cluster() as cluster:
        _, decode = await cluster.pair(lease=3.0)
        answer = cluster.sequencer.answer(ask_for("a", 20, max_tokens=5), Watch())
        await anext(answer)
        await asyncio.sleep(10.0)
        assert decode.stage.load(0).running == 0  # done long ago
        assert [token.index async for token in answer] == [1, 2, 3, 4]


@on_virtual_time
async def test_who_gets_no_room_in_time_is_told_to_come_back() -> None:
    async with Cluster(queue_timeout=1.0, max_waiting=2) as cluster:
        await cluster.pair(blocks=12, step_s=0.2)
        held = asyncio.create_task(cluster.check(ask_for("a", 30, max_tokens=18)))
        await asyncio.sleep(0.6)
        began = clock()
        late = [asyncio.create_task(cluster.ask(ask_for(f"r{n}", 30))) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="Too many"):
            await cluster.ask(ask_for("third", 5))
        for task in late:
            with pytest.raises(Overloaded, match="in time") as caught:
                await task
            assert caught.value.retry_after
        assert clock() - began == pytest.approx(1.0, abs=0.3)
        await held
        await cluster.idle(within=0.1)


# Cancel in every phase (R4).


async def _cancelled_after(delay: float, cluster: Cluster, request: Request) -> str:
    """The phase in which it was cancelled, or "done"."""
    answer = asyncio.create_task(cluster.ask(request))
    await asyncio.sleep(delay)
    if not answer.cancel():
        return "done"
    with suppress(asyncio.CancelledError):
        await answer
    return "cancelled"


@pytest.mark.parametrize("first", range(4))
def test_a_cancel_at_any_time_frees_both_sides_within_a_second(first: int) -> None:
    async def main() -> None:
        outcomes = set()
        for step in range(first, 140, 4):
            async with Cluster(seed=step, delay_s=0.006) as cluster:
                await cluster.pair(blocks=40, chunk_bytes=64)
                outcomes.add(await _cancelled_after(step * 2 * MS, cluster, ask_for("a", 50)))
                await cluster.idle(within=1.0)
                await cluster.check(ask_for("next", 50))
        assert outcomes == {"cancelled", "done"}

    run(main())


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.02, 0.1, 0.3])
def test_a_cancel_while_others_run_concerns_nobody_else(delay: float) -> None:
    async def main() -> None:
        async with Cluster(seed=7) as cluster:
            await cluster.pair(blocks=20)  # most of them wait for room
            others = [
                asyncio.create_task(cluster.check(ask_for(f"r{number}", 20))) for number in range(5)
            ]
            shared = replace(ask_for("r0", 20), id="shares a prefix")
            await _cancelled_after(delay, cluster, shared)
            await asyncio.gather(*others)
            await cluster.idle(within=1.0)
            assert cluster.sequencer.running == cluster.sequencer.waiting == 0

    run(main())


@on_virtual_time
async def test_a_client_that_stops_reading_early_frees_both_sides() -> None:
    async with Cluster() as cluster:
        await cluster.pair()
        for stop_after in (1, 2, 5):
            answer = cluster.sequencer.answer(ask_for(f"{stop_after}", 30), Watch())
            for _ in range(stop_after):
                await anext(answer)
            await answer.aclose()
            await cluster.idle(within=1.0)


@on_virtual_time
async def test_a_gateway_that_goes_takes_its_requests_with_it() -> None:
    for step in range(0, 120, 5):
        async with Cluster(seed=step) as cluster:
            await cluster.pair(chunk_bytes=64)
            answer = asyncio.create_task(cluster.ask(ask_for("a", 40)))
            await asyncio.sleep(step * MS)
            for member in cluster.pools.members:
                cluster.pools.leave(member)
            await asyncio.gather(answer, return_exceptions=True)
            await cluster.idle(within=1.0)


# Loss.


@pytest.mark.parametrize("how", ["kill", "freeze"])
@pytest.mark.parametrize("role", [PREFILL, DECODE, BOTH])
def test_a_worker_may_die_at_any_time_and_nobody_notices(role: str, how: str) -> None:
    async def main() -> None:
        phases: set[str] = set()
        for step in range(0, 130, 9):
            async with Cluster(seed=step) as cluster:
                if role == BOTH:
                    victim = await cluster.undivided()
                else:
                    pair = await cluster.pair(lease=3.0, chunk_bytes=64)
                    victim = pair[role == DECODE]
                cluster.add(role, "spare", chunk_bytes=64)
                await cluster.joined(2 if role == BOTH else 3)
                shared = ask_for("a", 40, max_tokens=14)
                asked = [replace(shared, id="a"), replace(shared, id="b"), ask_for("c", 40)]
                answers = [asyncio.create_task(cluster.check(request)) for request in asked]
                await asyncio.sleep(step * 2 * MS)
                if how == "kill":
                    await victim.kill()
                else:
                    victim.freeze()
                struck = clock()
                watches = await asyncio.gather(*answers)
                assert clock() - struck < 3.5
                phases |= {loss.phase for watch in watches for loss in watch.recoveries}
                if how == "freeze":
                    victim.thaw()
                    await cluster.joined(2 if role == BOTH else 3)
                    await cluster.check(ask_for("d", 40))
                await cluster.idle(within=3.5)
        least = {
            PREFILL: {"prefilling", "handing_off"},
            DECODE: {"handing_off", "decoding"},
            BOTH: {"prefilling", "decoding"},
        }
        assert phases >= least[role]

    run(main())


@on_virtual_time
async def test_a_landing_outlives_its_prefill_worker() -> None:
    async with Cluster() as cluster:
        _, decode = await cluster.pair(step_s=0.1, chunk_bytes=64)
        cluster.add(PREFILL, "q")
        await cluster.joined(3)
        answer = asyncio.create_task(cluster.check(ask_for("a", 60)))
        while not decode.landings.counters["chunks"]:
            await asyncio.sleep(MS)
        await next(w for w in cluster.workers if w.hello.role == PREFILL and w.runner.steps).kill()
        await answer
        assert decode.landings.counters["promised"] == decode.landings.counters["rearmed"] == 1


@on_virtual_time
async def test_with_nobody_left_to_read_the_decoder_reads_by_itself() -> None:
    async with Cluster() as cluster:
        prefill, _ = await cluster.pair()
        await prefill.kill()
        assert cluster.pools.ready()
        watch = await cluster.check(ask_for("a", 40))
        assert watch.fallback
        cluster.add(PREFILL, "q")
        await cluster.joined(2)
        assert not (await cluster.check(ask_for("b", 40))).fallback
        await cluster.idle(within=0.1)


@on_virtual_time
async def test_with_nobody_left_to_write_it_waits_a_little_and_then_says_so() -> None:
    async with Cluster() as cluster:
        _, decode = await cluster.pair()
        running = asyncio.create_task(cluster.ask(ask_for("a", 20, max_tokens=200)))
        await asyncio.sleep(0.5)
        await decode.kill()
        began = clock()
        for answer in (running, cluster.ask(ask_for("b", 20))):
            with pytest.raises(NoWorkers):
                await answer
        assert 5.0 <= clock() - began < 10.5
        soon = asyncio.create_task(cluster.check(ask_for("c", 20)))
        await asyncio.sleep(4)
        cluster.add(DECODE, "d")
        await soon


@on_virtual_time
async def test_a_prefill_worker_may_die_once_the_landing_is_sealed() -> None:
    async with Cluster() as cluster:
        prefill = cluster.add(PREFILL, "p")
        decode = cluster.add(DECODE, "d", step_s=0.4)
        await cluster.joined(2)
        answer = asyncio.create_task(cluster.check(ask_for("a", 40)))
        while not decode.landings.counters["sealed"]:
            await asyncio.sleep(MS)
        await prefill.kill()
        await answer


@on_virtual_time
async def test_a_hung_step_loop_is_noticed_although_its_beats_go_on() -> None:
    async with Cluster() as cluster:
        _, decode = await cluster.pair()
        answer = asyncio.create_task(cluster.check(ask_for("a", 20, max_tokens=200)))
        await asyncio.sleep(0.5)
        decode.hung = True
        began = clock()
        while any(m.hello.role == DECODE for m in cluster.pools.members):
            await asyncio.sleep(MS)
        assert 2.7 < clock() - began < 3.3  # its last beat may be one old, and so may ours
        spare = cluster.add(DECODE, "e")
        watch = await answer
        assert [(loss.phase, loss.cause) for loss in watch.recoveries] == [("decoding", "hung")]
        await spare.kill()
        await asyncio.sleep(2.0)  # the hung one has joined again and still does not move
        with pytest.raises(NoWorkers):
            await cluster.ask(ask_for("b", 20))
        decode.hung = False
        await cluster.check(ask_for("c", 20))


@pytest.mark.parametrize("role", [PREFILL, DECODE])
def test_a_short_stop_aborts_nothing(role: str) -> None:
    async def main() -> None:
        async with Cluster() as cluster:
            pair = await cluster.pair(lease=3.0, chunk_bytes=64)
            for step in range(0, 60, 5):
                answer = asyncio.create_task(cluster.check(ask_for(f"{step}", 40)))
                await asyncio.sleep(step * 3 * MS)
                pair[role == DECODE].freeze()
                await asyncio.sleep(0.5)
                pair[role == DECODE].thaw()
                assert not (await answer).recoveries
                await cluster.idle(within=3.5)

    run(main())


@on_virtual_time
async def test_a_queue_drains_as_fast_as_there_is_room() -> None:
    async with Cluster() as cluster:
        cluster.add(PREFILL, "p", step_s=0.1, blocks=4096, budget=512)
        cluster.add(DECODE, "d", blocks=40)
        await cluster.joined(2)
        await asyncio.gather(*(cluster.check(ask_for(f"r{n}", 16)) for n in range(64)))
        assert clock() < 4


@on_virtual_time
async def test_a_silent_worker_is_lost_and_finds_itself_fenced() -> None:
    async with Cluster() as cluster:
        _, decode = await cluster.pair()
        cluster.add(DECODE, "e")
        await cluster.joined(3)
        answer = asyncio.create_task(cluster.check(ask_for("a", 20, max_tokens=200)))
        await asyncio.sleep(0.5)
        assert decode.stage.load(0).running  # ties go by name
        decode.freeze()
        began = clock()
        while len(cluster.pools.members) == 3:
            await asyncio.sleep(MS)
        assert 1.05 < clock() - began < 1.51
        watch = await answer
        assert [loss.cause for loss in watch.recoveries] == ["silent"]
        decode.thaw()
        await cluster.idle(within=1.0)
        await cluster.joined(3)
        assert decode.hello.peer in [member.peer for member in cluster.pools.members]
        await cluster.check(ask_for("c", 20))


@on_virtual_time
async def test_a_new_start_under_the_same_name_evicts_the_old() -> None:
    async with Cluster() as cluster:
        _, old = await cluster.pair()
        answer = asyncio.create_task(cluster.check(ask_for("a", 20, max_tokens=200)))
        await asyncio.sleep(0.3)
        new = cluster.add(DECODE, "d")
        watch = await answer
        assert [loss.cause for loss in watch.recoveries] == ["replaced"]
        assert [m.peer for m in cluster.pools.members if m.hello.role == DECODE] == [new.hello.peer]
        await cluster.idle(within=1.0)
        await cluster.check(ask_for("b", 20))
        assert new.runner.steps
        assert old.refused and not old.alive


@on_virtual_time
async def test_a_worker_that_joins_again_while_it_is_a_member_stays_one() -> None:
    async with Cluster() as cluster:
        _, decode = await cluster.pair()
        await cluster.check(ask_for("a", 20))
        member = cluster.pools.join(decode.hello)
        await asyncio.sleep(0.1)
        assert member.session.lost is None
        await cluster.check(ask_for("b", 20))


@on_virtual_time
async def test_a_step_that_raises_fails_the_requests_in_it_and_no_other() -> None:
    async with Cluster() as cluster:
        prefill, decode = await cluster.pair()
        decode.runner.explode = True
        with pytest.raises(EngineFailed):  # at its second attempt: there is nobody else
            await cluster.ask(ask_for("a", 20))
        decode.runner.explode = False
        prefill.runner.explode = True
        assert (await cluster.check(ask_for("b", 20))).fallback
        prefill.runner.explode = False
        await cluster.idle(within=1.0)
        assert not (await cluster.check(ask_for("c", 20))).recoveries


@on_virtual_time
async def test_a_step_that_raises_once_is_made_good() -> None:
    async with Cluster() as cluster:
        pair = await cluster.pair()
        for number, worker in enumerate(pair):
            worker.runner.explode = True
            answer = asyncio.create_task(cluster.check(ask_for(f"{number}", 20)))
            while not worker.runner.exploded:
                await asyncio.sleep(MS)
            worker.runner.explode = False
            watch = await answer
            assert [loss.cause for loss in watch.recoveries] == ["engine"]


def _once(kind: type, skip: int = 0) -> Callable[[Any], bool]:
    """Loses one item of this kind, after letting `skip` of them pass."""
    left = [skip]

    def lose(item: Any) -> bool:
        if isinstance(item, kind):
            left[0] -= 1
        return isinstance(item, kind) and left[0] == -1

    return lose


@pytest.mark.parametrize(
    ("kind", "skip"),
    [(Start, 0), (Greeting, 0), (Welcome, 0), (Chunk, 0), (Chunk, 20), (Manifest, 0)],
)
def test_a_lost_message_is_made_good_when_the_lease_is_over(kind: type, skip: int) -> None:
    async def main() -> None:
        async with Cluster() as cluster:
            await cluster.pair(lease=3.0, chunk_bytes=64)
            cluster.lose = _once(kind, skip)
            watch = await cluster.check(ask_for("a", 40))
            assert len(cluster.lost) == 1
            assert [loss.cause for loss in watch.recoveries] == ["transfer"]
            assert clock() < 3.0 + 1.0
            await cluster.idle(within=3.5)
            await cluster.check(ask_for("b", 40))

    run(main())


@on_virtual_time
async def test_a_lost_acknowledgement_costs_nothing_when_all_has_arrived() -> None:
    async with Cluster() as cluster:
        await cluster.pair(lease=3.0, chunk_bytes=64)
        cluster.lose = _once(Ack, 3)
        await cluster.check(ask_for("a", 40))
        assert len(cluster.lost) == 1
        await cluster.idle(within=3.5)
        await cluster.check(ask_for("b", 40))


@pytest.mark.parametrize("kind", [Promise, Prefill, Generate])
def test_a_lost_order_holds_nothing_once_its_client_gives_up(kind: type) -> None:
    async def main() -> None:
        async with Cluster() as cluster:
            if kind is Generate:
                await cluster.undivided()
            else:
                await cluster.pair(lease=3.0)
            cluster.lose = _once(kind)
            with suppress(TimeoutError):
                async with asyncio.timeout(10):
                    await cluster.check(ask_for("a", 40))
            assert len(cluster.lost) == 1
            await cluster.idle(within=1.0)
            await cluster.check(ask_for("b", 40))

    run(main())


@pytest.mark.parametrize("skip", range(12))
def test_a_lost_report_leaves_no_gap_and_no_block(skip: int) -> None:
    async def main() -> None:
        async with Cluster() as cluster:
            await cluster.pair(lease=3.0)
            cluster.lose = _once(Report, skip)
            with suppress(BatonError, TimeoutError):
                async with asyncio.timeout(20):
                    await cluster.check(ask_for("a", 40, max_tokens=5))
            await cluster.idle(within=1.0)

    run(main())


@pytest.mark.parametrize("delay", [0.01, 0.04, 0.06, 0.15])
def test_a_lost_cancel_is_made_good_by_lease_or_length(delay: float) -> None:
    async def main() -> None:
        async with Cluster() as cluster:
            await cluster.pair(lease=3.0)
            cluster.lose = lambda item: isinstance(item, Cancel)
            await _cancelled_after(delay, cluster, ask_for("a", 40, max_tokens=30))
            assert cluster.lost
            await cluster.idle(within=3.5)

    run(main())


@on_virtual_time
async def test_a_lost_seal_costs_the_sender_only_its_lease() -> None:
    async with Cluster() as cluster:
        await cluster.pair(lease=3.0)
        cluster.lose = _once(Sealed)
        await cluster.check(ask_for("a", 40))
        await cluster.idle(within=3.5)


@on_virtual_time
async def test_a_slow_prefill_keeps_its_landing_alive() -> None:
    async with Cluster() as cluster:
        cluster.add(PREFILL, "p", step_s=8.0)
        cluster.add(DECODE, "d", lease=3.0)
        await cluster.joined(2)
        await cluster.check(ask_for("a", 16))
        cluster.lose = lambda item: isinstance(item, Renew)
        watch = await cluster.check(ask_for("b", 16))
        assert [loss.cause for loss in watch.recoveries] == ["transfer"] and watch.fallback


# Draining.


@on_virtual_time
async def test_a_draining_decoder_finishes_what_runs_and_gets_nothing_new() -> None:
    async with Cluster() as cluster:
        cluster.add(PREFILL, "p")
        old = cluster.add(DECODE, "d0")
        await cluster.joined(2)
        running = [
            asyncio.create_task(cluster.check(ask_for(f"r{n}", 10 * n, max_tokens=30)))
            for n in range(1, 4)
        ]
        await asyncio.sleep(0.02)  # one of them still only promised
        cluster.add(DECODE, "d1")
        await cluster.joined(3)
        draining = asyncio.create_task(old.drain())
        await asyncio.sleep(0)
        watch = await cluster.check(ask_for("late", 10))
        assert watch.decode_worker == "d1"
        assert not old.left.is_set()
        await asyncio.gather(*running)
        await draining
        assert [m.peer.name for m in cluster.pools.members] == ["p", "d1"]


@pytest.mark.parametrize("role", [PREFILL, DECODE, BOTH])
def test_what_a_drain_finds_unfinished_moves(role: str) -> None:
    async def main() -> None:
        for step in range(0, 60, 3):
            async with Cluster(seed=step) as cluster:
                if role == BOTH:
                    old = await cluster.undivided()
                else:
                    old = (await cluster.pair(chunk_bytes=64))[role == DECODE]
                cluster.add(role, "other")
                await cluster.joined(2 if role == BOTH else 3)
                asked = [ask_for(f"r{n}", 40, max_tokens=40) for n in range(3)]
                answers = [asyncio.create_task(cluster.check(request)) for request in asked]
                await asyncio.sleep(step * 3 * MS)
                await old.drain(limit=0.05)
                watches = await asyncio.gather(*answers)
                assert {loss.cause for w in watches for loss in w.recoveries} <= {"drained"}
                await cluster.idle(within=0.5)

    run(main())


@pytest.mark.parametrize("role", [PREFILL, DECODE])
def test_a_drain_at_any_time_fails_nobody(role: str) -> None:
    async def main() -> None:
        for step in range(0, 60, 3):
            async with Cluster(seed=step) as cluster:
                old = (await cluster.pair())[role == DECODE]
                cluster.add(role, "other")
                await cluster.joined(3)
                answers = [
                    asyncio.create_task(cluster.check(ask_for(f"r{n}", 40))) for n in range(3)
                ]
                await asyncio.sleep(step * 3 * MS)
                await old.drain()
                await asyncio.gather(*answers)
                await cluster.idle(within=0.5)

    run(main())


# Orders said twice, late or to the wrong worker.


@on_virtual_time
async def test_orders_said_twice_or_late_change_nothing() -> None:
    async with Cluster() as cluster:
        prefill, decode = await cluster.pair()
        request = ask_for("a", 40, max_tokens=30)
        watch = Watch(arrived=clock())
        answer = cluster.sequencer.answer(request, watch)
        tokens = [await anext(answer), await anext(answer)]
        (session,) = decode.service._reports
        for order in (
            Promise(request, 1),
            Start("a", tokens[0].token, 1),
            Start("a", 5, 0),
            Start("unknown", 5, 1),
            Promise(request, 0),
            Cancel("a", 0),
            Cancel("unknown", 9),
            Generate(request, 1),
        ):
            decode.post(Ordered(session, order, clock()))
        prefill.post(Ordered(session, Cancel("a", 0), clock()))
        tokens += [token async for token in answer]
        assert [token.token for token in tokens] == expected(request)
        await cluster.idle(within=0.1)


@on_virtual_time
async def test_an_order_to_the_wrong_role_is_refused() -> None:
    async with Cluster() as cluster:
        prefill, decode = await cluster.pair()
        for member in cluster.pools.members:
            mailbox: asyncio.Queue[Any] = asyncio.Queue()
            member.session.listen("a", mailbox)
            request = ask_for("a", 5)
            wrong = Prefill(request, None) if member.hello.role == DECODE else Promise(request)
            member.session.send(wrong)
            assert (await mailbox.get()).code == "wrong_role"
        assert prefill.alive and decode.alive
        await cluster.idle(within=0.1)


# By chance.


async def _random_life(seed: int) -> list[tuple[float, str, str]]:
    """20 requests, some cancelled, over two pairs of which one worker may die."""
    random = Random(seed)
    async with Cluster(seed, delay_s=random.choice([0.0005, 0.004, 0.03])) as cluster:
        for name, role in (("p0", PREFILL), ("p1", PREFILL), ("d0", DECODE), ("d1", DECODE)):
            cluster.add(
                role,
                name,
                block_size=random.choice([1, 3, 4, 8]),
                blocks=random.choice([60, 90]),
                chunk_bytes=random.choice([64, 500]),
                credit=random.choice([600, 5000]),
                lease=3.0,
            )
        await cluster.joined(4)
        prompts = [ask_for(f"{seed} {number}", random.randrange(1, 40)) for number in range(4)]
        victim = random.choice(cluster.workers) if seed % 2 else None

        async def client(number: int) -> None:
            await asyncio.sleep(random.uniform(0, 0.5))
            prompt = random.choice(prompts).tokens[: random.randrange(1, 40)]
            request = ask_for(f"{number}", list(prompt), random.randrange(1, 20))
            patience = random.choice([60.0, 60.0, 0.3])
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0, patience)):
                    await asyncio.sleep(0)
                    watch = await cluster.check(request)
                    assert not watch.recoveries or victim is not None

        async with asyncio.TaskGroup() as clients:
            for number in range(20):
                clients.create_task(client(number))
            if victim is not None:
                await asyncio.sleep(random.uniform(0, 0.6))
                await victim.kill()
        await cluster.idle(within=3.5)
        for worker in cluster.workers:
            assert not worker.runner.faults, worker.runner.faults
        assert len(cluster.pools.members) == len(cluster.workers)
        return cluster.trace


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_the_answers_are_right_and_the_blocks_come_back(seed: int) -> None:
    run(_random_life(seed))


@pytest.mark.parametrize("seed", [4, 5])
def test_the_same_seed_gives_the_same_run(seed: int) -> None:
    one, two = (_without_ids(run(_random_life(seed))) for _ in range(2))
    assert one == two


def _without_ids(trace: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Landing ids are random for whoever would guess them, not for us."""
    return [(at, who, said) for at, who, said in trace if "Landing" not in said]
