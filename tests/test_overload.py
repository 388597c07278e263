"""Too much at once, in the whole cluster on virtual time.

A prefill worker of these tests computes 64 tokens in 40 ms: 1,600 a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.errors import Overloaded
from cluster.messages import DECODE, PREFILL, Request
from gateway.fair import ANYBODY, Standing
from gateway.pace import WINDOW_S
from gateway.relay import Watch
from tests.cluster_in_process import Cluster
from tests.hash_model import ask_for, expected
from tests.virtual import clock, on_virtual_time

SPEED = 1600.0


async def pair(cluster: Cluster, **decode: Any) -> None:
    cluster.add(PREFILL, "p", blocks=4000, budget=64, step_s=64 / SPEED)
    cluster.add(DECODE, "d", **{"blocks": 8000, **decode})
    await cluster.joined(2)


@dataclass
class Outcome:
    ttfts: list[float] = field(default_factory=list)
    refusals: list[Overloaded] = field(default_factory=list)
    refused_after: list[float] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)


async def ask(
    cluster: Cluster, request: Request, outcome: Outcome, standing: Standing = ANYBODY
) -> None:
    """One call as a gateway makes it: admitted or refused at once, then held to what it must be."""
    began, watch = clock(), Watch(arrived=clock())
    tokens: list[int] = []
    try:
        cluster.sequencer.admit(standing)
        async with aclosing(cluster.sequencer.answer(request, watch, standing)) as answer:
            async for token in answer:
                if not tokens:
                    outcome.ttfts.append(clock() - began)
                tokens.append(token.token)
    except Overloaded as refusal:
        outcome.refusals.append(refusal)
        outcome.refused_after.append(clock() - began)
        return
    assert tokens == expected(request)
    outcome.watches.append(watch)


async def offered(
    cluster: Cluster, rate: float, seconds: float, *, prompt: int, answer: int
) -> tuple[Outcome, int]:
    """So many requests a second, evenly; the outcome and the most that waited at once."""
    outcome, most = Outcome(), 0
    async with asyncio.TaskGroup() as asking:
        for number in range(int(rate * seconds)):
            request = ask_for(f"r{number}", prompt, max_tokens=answer)
            asking.create_task(ask(cluster, request, outcome))
            await asyncio.sleep(1 / rate)
            most = max(most, cluster.sequencer.waiting)
    return outcome, most


@on_virtual_time
async def test_four_times_too_many_prompts() -> None:
    async with Cluster(max_queue_delay=1.0) as cluster:
        await pair(cluster)
        sustainable = SPEED / 64
        outcome, most = await offered(cluster, 4 * sustainable, 5.0, prompt=64, answer=2)
        assert len(outcome.ttfts) > 0.9 * 5 * sustainable, "not much less than all it can"
        assert len(outcome.refusals) > 0.6 * 20 * sustainable
        assert max(outcome.ttfts) < 1.0 + WINDOW_S + 0.5
        assert max(outcome.refused_after) == 0.0
        assert all(refusal.retry_after for refusal in outcome.refusals)
        assert most < 3 * sustainable


@on_virtual_time
async def test_four_times_too_many_answers() -> None:
    """Decode workers run out of seats while prompts are quick to read."""
    async with Cluster(max_queue_delay=1.0) as cluster:
        await pair(cluster, max_sequences=8)
        sustainable = 8 / (50 * 0.01)  # eight seats, an answer of 50 tokens takes half a second
        outcome, most = await offered(cluster, 4 * sustainable, 8.0, prompt=8, answer=50)
        assert len(outcome.ttfts) > 0.8 * 8 * sustainable
        assert len(outcome.refusals) > 0.5 * 32 * sustainable
        # Those of the first moments, before the pace of room was known, may have waited longer.
        assert max(outcome.ttfts[-50:]) < 1.0 + WINDOW_S + 0.5
        assert max(outcome.refused_after) == 0.0
        assert most < 6 * sustainable


@on_virtual_time
async def test_who_comes_back_when_told_to_is_let_in() -> None:
    async with Cluster(max_queue_delay=1.0) as cluster:
        await pair(cluster)
        outcome = Outcome()
        async with asyncio.TaskGroup() as asking:
            for number in range(150):  # 6 s of work in 1.5 s
                request = ask_for(f"r{number}", 64, max_tokens=2)
                asking.create_task(ask(cluster, request, outcome))
                await asyncio.sleep(0.01)
            again = Outcome()
            await asyncio.sleep(outcome.refusals[-1].retry_after or 0)
            asking.create_task(ask(cluster, ask_for("again", 64, max_tokens=2), again))
        assert again.ttfts and again.ttfts[0] < 1.0 + WINDOW_S + 0.5


@on_virtual_time
async def test_a_cluster_not_measured_yet_refuses_nobody() -> None:
    async with Cluster(max_queue_delay=0.5) as cluster:
        await pair(cluster)
        outcome = Outcome()
        await asyncio.gather(
            *(ask(cluster, ask_for(f"{n}", 100, max_tokens=2), outcome) for n in range(100))
        )
        assert len(outcome.ttfts) == 100


def flood(cluster: Cluster, prompt: int, count: int) -> list[asyncio.Task[None]]:
    requests = [ask_for(f"{clock()}/{number}", prompt, max_tokens=2) for number in range(count)]
    return [
        asyncio.create_task(ask(cluster, request, Outcome(), Standing("flood")))
        for request in requests
    ]


@pytest.mark.parametrize(("prompt", "count"), [(1600, 6), (100, 80)], ids=["long", "many"])
def test_one_tenants_flood_does_not_hold_up_anothers_short_prompt(prompt: int, count: int) -> None:
    @on_virtual_time
    async def test() -> None:
        async with Cluster() as cluster:
            await pair(cluster)
            await asyncio.gather(*flood(cluster, prompt, 4))  # its speed is known now
            tasks = flood(cluster, prompt, count)
            await asyncio.sleep(0.5)
            for number in range(3):
                outcome = Outcome()
                await ask(cluster, ask_for(f"{number}", 20), outcome, Standing("short"))
                assert outcome.ttfts[0] < WINDOW_S + 0.2
                await asyncio.sleep(0.5)
            assert not all(task.done() for task in tasks)
            await asyncio.gather(*tasks)

    test()


@on_virtual_time
async def test_tenants_share_a_prefill_worker_by_weight() -> None:
    async with Cluster() as cluster:
        await pair(cluster)
        served: Counter[str] = Counter()

        async def one(number: int, standing: Standing) -> None:
            await ask(cluster, ask_for(f"{standing.tenant}{number}", 64, 2), Outcome(), standing)
            served[standing.tenant] += 1

        await asyncio.gather(*flood(cluster, 400, 2))  # its speed is known now
        heavy, light = Standing("heavy", weight=3.0), Standing("light")
        async with asyncio.TaskGroup() as asking:
            for number in range(100):
                asking.create_task(one(number, heavy))
                asking.create_task(one(number, light))
            await asyncio.sleep(4.0)
            assert served["heavy"] + served["light"] > 80
            assert served["heavy"] == pytest.approx(3 * served["light"], rel=0.25)


@on_virtual_time
async def test_an_urgent_request_waits_for_nothing_but_what_is_being_read() -> None:
    async with Cluster() as cluster:
        await pair(cluster)
        await asyncio.gather(*flood(cluster, 400, 2))  # its speed is known now
        tasks = flood(cluster, 200, 40)
        await asyncio.sleep(1.0)
        outcome = Outcome()
        await ask(cluster, ask_for("u", 100), outcome, Standing("flood", priority=-1))
        assert outcome.ttfts[0] < 2 * WINDOW_S
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("prompt", [16, 64, 1000])
def test_holding_requests_back_costs_no_speed(prompt: int) -> None:
    @on_virtual_time
    async def test() -> None:
        async with Cluster() as cluster:
            await pair(cluster)
            began, count = clock(), min(250, 8000 // prompt)
            await asyncio.gather(*flood(cluster, prompt, count))
            assert clock() - began < 1.1 * prompt * count / SPEED

    test()


@on_virtual_time
async def test_a_slow_worker_gets_less_and_is_left_alone() -> None:
    async with Cluster() as cluster:
        cluster.add(PREFILL, "fast", blocks=4000, budget=64, step_s=64 / SPEED)
        cluster.add(PREFILL, "slow", blocks=4000, budget=64, step_s=640 / SPEED)
        cluster.add(DECODE, "d", blocks=8000)
        await cluster.joined(3)
        outcome, _ = await offered(cluster, 20, 10.0, prompt=64, answer=2)
        read = Counter(watch.prefill_worker for watch in outcome.watches)
        assert read["slow"] > 0
        assert read["fast"] > 5 * read["slow"]
        assert not any(watch.recoveries for watch in outcome.watches)
        assert len(outcome.watches) == 200


@on_virtual_time
async def test_who_lost_its_worker_goes_before_those_who_have_nothing_yet() -> None:
    async with Cluster() as cluster:
        doomed = cluster.add(PREFILL, "a", blocks=4000, budget=64, step_s=64 / SPEED)
        cluster.add(PREFILL, "b", blocks=4000, budget=64, step_s=64 / SPEED)
        cluster.add(DECODE, "d", blocks=8000)
        await cluster.joined(3)
        outcome = Outcome()
        tasks = [
            asyncio.create_task(ask(cluster, ask_for(f"{n}", 64, 2), outcome)) for n in range(200)
        ]
        await asyncio.sleep(1.0)
        await doomed.kill()
        await asyncio.gather(*tasks)
        pauses = [loss.seconds for watch in outcome.watches for loss in watch.recoveries]
        assert pauses
        assert max(pauses) < 3 * WINDOW_S, "not behind the seconds of work that were waiting"


@on_virtual_time
async def test_a_full_queue_has_a_place_for_a_tenant_that_has_none() -> None:
    async with Cluster(max_waiting=20) as cluster:
        await pair(cluster)
        outcome, other = Outcome(), Outcome()
        tasks = [
            asyncio.create_task(ask(cluster, ask_for(f"{n}", 100, 2), outcome, Standing("flood")))
            for n in range(40)
        ]
        await asyncio.sleep(0)
        assert cluster.sequencer.waiting == 20
        await ask(cluster, ask_for("o", 20, 2), other, Standing("other"))
        await asyncio.gather(*tasks)
        assert len(outcome.refusals) == 20 and other.ttfts
