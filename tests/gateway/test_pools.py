from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cluster.errors import HandshakeRefused, WorkerLost
from cluster.messages import (
    BOTH,
    DECODE,
    PREFILL,
    Fingerprint,
    Hello,
    KVLayout,
    LayerGroup,
    Load,
    Peer,
    Request,
    Sampling,
    Token,
)
from gateway.pools import HELLO_S, Pools, Route, serve_membership
from gateway.session import Mailbox
from tests.gateway.scripted import Scripted, hello
from tests.virtual import clock, hold_up, on_virtual_time

ASK = Request("r", tuple(range(64)))


def names(route: Route | None) -> tuple[str, str]:
    """(prefill worker, decode worker), empty where there is none."""
    assert route is not None
    return tuple(member.peer.name if member else "" for member in (route.prefill, route.decode))  # type: ignore[return-value]


@on_virtual_time
async def test_a_pair_comes_before_an_undivided_worker() -> None:
    cluster = Scripted()
    assert cluster.pools.route(ASK) is None and not cluster.pools.ready()
    cluster.add("p", PREFILL)
    assert cluster.pools.route(ASK) is None and not cluster.pools.ready()
    cluster.add("b", BOTH)
    assert names(cluster.pools.route(ASK)) == ("", "b") and cluster.pools.ready()
    decode = cluster.add("d", DECODE)
    assert names(cluster.pools.route(ASK)) == ("p", "d") and cluster.pools.ready()
    assert names(cluster.pools.route(ASK, [Peer("d", 1)])) == ("", "b")
    assert names(cluster.pools.route(ASK, [Peer("d", 2)])) == ("p", "d")  # another start of it
    cluster.pools.leave(decode)
    assert names(cluster.pools.route(ASK)) == ("", "b")


@on_virtual_time
async def test_who_has_enough_to_read_is_spared_by_those_who_can_wait() -> None:
    cluster = Scripted()
    prefill, _ = cluster.pair()
    prefill.reading.add("other", 10**6, 0.0)
    assert cluster.pools.route(ASK, paced=True) is not None, "a short one is let by"
    for number in range(100):
        prefill.reading.add(f"{number}", len(ASK.tokens), 0.0)
    assert cluster.pools.route(ASK, paced=True) is None, "no decode worker reads for it"
    assert names(cluster.pools.route(ASK)) == ("p", "d")
    cluster.add("q", PREFILL)
    assert names(cluster.pools.route(ASK, paced=True)) == ("q", "d")


@on_virtual_time
async def test_readers_are_those_who_read_prompts_now() -> None:
    cluster = Scripted()
    assert cluster.pools.readers() == []
    decode = cluster.add("d", DECODE)
    assert cluster.pools.readers() == [decode]
    both = cluster.add("b", BOTH)
    assert cluster.pools.readers() == [both]
    prefill = cluster.add("p", PREFILL)
    assert cluster.pools.readers() == [prefill]


@on_virtual_time
async def test_one_token_needs_no_decode_worker() -> None:
    cluster = Scripted()
    cluster.add("p", PREFILL)
    assert names(cluster.pools.route(Request("r", (1,), Sampling(max_tokens=1)))) == ("p", "")


@on_virtual_time
async def test_who_drains_gets_nothing_new() -> None:
    cluster = Scripted()
    _, decode = cluster.pair()
    cluster.pools.report(decode, Load(1, draining=True))
    assert cluster.pools.route(ASK) is None and not cluster.pools.ready()


@on_virtual_time
async def test_requests_spread_before_any_load_is_reported() -> None:
    cluster = Scripted()
    for name in ("p0", "p1"):
        cluster.add(name, PREFILL)
    for name in ("d0", "d1"):
        cluster.add(name, DECODE)
    requests = [Request(f"r{i}", tuple(range(64 * i, 64 * i + 64))) for i in range(4)]
    routes = [names(cluster.pools.route(request)) for request in requests]
    assert routes == [("p0", "d0"), ("p1", "d1"), ("p0", "d0"), ("p1", "d1")]


@on_virtual_time
async def test_a_report_replaces_what_was_guessed() -> None:
    cluster = Scripted()
    first, second = cluster.add("d0", DECODE), cluster.add("d1", DECODE)
    cluster.add("p", PREFILL)
    cluster.beat(first, owned_blocks=50)
    assert names(cluster.pools.route(ASK))[1] == "d1"
    cluster.beat(first)
    cluster.beat(second, promised_blocks=50)
    assert names(cluster.pools.route(ASK))[1] == "d0"


@on_virtual_time
async def test_a_known_prefix_draws_a_request_to_its_worker() -> None:
    cluster = Scripted()
    cluster.add("d", DECODE)
    members = [cluster.add(name, PREFILL) for name in ("p0", "p1")]
    assert names(cluster.pools.route(ASK))[0] == "p0"
    other = Request("other", tuple(range(1000, 1064)))
    assert names(cluster.pools.route(other))[0] == "p1"
    for member in members:
        cluster.beat(member)
    assert names(cluster.pools.route(Request("again", (*range(1000, 1064), 5))))[0] == "p1"
    for member in members:
        cluster.beat(member)
    salted = Request("salted", other.tokens, salt=b"x")
    assert names(cluster.pools.route(salted))[0] == "p0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": 99}, "protocol of worker d is 99, the cluster has 2"),
        ({"fingerprint": Fingerprint("other", "weights")}, "model configuration .* other"),
        ({"fingerprint": Fingerprint("config", "other")}, "weights .* other"),
        ({"layout": KVLayout((LayerGroup(1, 1, 4),), "float32")}, "KV layout"),
    ],
)
def test_who_does_not_fit_is_refused_with_both_values(
    changes: dict[str, object], message: str
) -> None:
    @on_virtual_time
    async def test() -> None:
        cluster = Scripted()
        cluster.add("p", PREFILL)
        with pytest.raises(HandshakeRefused, match=message):
            cluster.add("d", DECODE, **changes)
        assert len(cluster.pools.members) == 1

    test()


@on_virtual_time
async def test_the_only_worker_may_come_back_with_other_weights() -> None:
    cluster = Scripted()
    cluster.add("p", PREFILL)
    cluster.add("p", PREFILL, incarnation=2, fingerprint=Fingerprint("config", "newer"))
    assert [member.peer.incarnation for member in cluster.pools.members] == [2]


@on_virtual_time
async def test_a_newer_start_evicts_the_older_that_is_refused_while_it_is_there() -> None:
    cluster = Scripted()
    old = cluster.add("d", DECODE, incarnation=4)
    mailbox = Mailbox()
    old.session.listen("r", mailbox)
    new = cluster.add("d", DECODE, incarnation=5)
    lost = mailbox.take()
    assert isinstance(lost, WorkerLost) and lost.cause == "replaced"
    with pytest.raises(HandshakeRefused, match=r"newer start of d, 0+5, is there .* 0+4: give"):
        cluster.add("d", DECODE, incarnation=4)
    cluster.pools.leave(old)  # late news of the old one
    assert cluster.pools.members == [new] and not new.session.lost


@on_virtual_time
async def test_whoever_comes_first_to_a_new_gateway_the_newer_start_stays() -> None:
    """The other may be the only one left, or have a wrong clock: nobody is shut out for good."""
    cluster = Scripted()
    cluster.add("d", DECODE, incarnation=4)
    newer = cluster.add("d", DECODE, incarnation=5)
    cluster.pools.leave(newer, "silent")
    cluster.add("d", DECODE, incarnation=4)
    newer = cluster.add("d", DECODE, incarnation=5)
    assert cluster.pools.members == [newer]


@pytest.mark.parametrize("between", [0.0, 1.0])
def test_the_same_start_may_join_again(between: float) -> None:
    @on_virtual_time
    async def test() -> None:
        cluster = Scripted()
        old = cluster.add("d", DECODE)
        await asyncio.sleep(between)
        new = cluster.add("d", DECODE)
        await asyncio.sleep(0.1)
        cluster.pools.leave(old)
        await asyncio.sleep(0.1)
        assert old.session.lost and not new.session.lost
        assert cluster.pools.members == [new]

    test()


@on_virtual_time
async def test_a_stream_that_ends_is_a_worker_that_is_gone() -> None:
    cluster = Scripted()
    member = cluster.add("d", DECODE)
    await asyncio.sleep(0.1)
    cluster.hang_up("d")
    await asyncio.sleep(0.1)
    assert cluster.pools.members == []
    cluster.pools.leave(member)  # late news of it


@on_virtual_time
async def test_silence_is_loss() -> None:
    cluster = Scripted()
    silent, alive = cluster.add("silent", DECODE), cluster.add("alive", PREFILL)
    watching = asyncio.create_task(cluster.pools.watch())
    began = clock()
    while silent in cluster.pools.members:
        cluster.beat(alive)
        await asyncio.sleep(0.01)
    assert 1.25 <= clock() - began <= 1.52  # looked at every 0.01 s
    assert cluster.pools.members == [alive]
    watching.cancel()


async def lost_after(cluster: Scripted) -> float:
    """How long a worker may be silent now."""
    member, began = cluster.add("d", DECODE), clock()
    while member in cluster.pools.members:
        await asyncio.sleep(0.01)
    return clock() - began


@on_virtual_time
async def test_who_is_starved_itself_is_patient_for_a_while() -> None:
    cluster = Scripted()
    watching = asyncio.create_task(cluster.pools.watch())
    await asyncio.sleep(0.1)
    hold_up(0.9)  # the next beat of ours comes so late, less what it was not yet due
    await asyncio.sleep(0.2)
    assert 1.75 < await lost_after(cluster) <= 2.02  # two beats more
    await asyncio.sleep(30)
    assert 1.25 <= await lost_after(cluster) <= 1.52
    hold_up(60)  # a suspended machine
    await asyncio.sleep(0.2)
    assert 2.5 < await lost_after(cluster) <= 3.02  # and never longer than a hang
    await asyncio.sleep(25)
    assert 1.25 <= await lost_after(cluster) <= 1.52
    watching.cancel()


@pytest.mark.parametrize(("silence", "least", "most"), [(0.7, 1.25, 1.52), (1.1, 2.0, 2.52)])
@on_virtual_time
async def test_a_worker_nearly_lost_that_comes_back_calls_for_patience(
    silence: float, least: float, most: float
) -> None:
    cluster = Scripted()
    watching = asyncio.create_task(cluster.pools.watch())
    member = cluster.add("p", PREFILL)
    await asyncio.sleep(silence)
    cluster.beat(member)
    assert least < await lost_after(cluster) <= most
    await asyncio.sleep(25)
    assert 1.25 <= await lost_after(cluster) <= 1.52
    watching.cancel()


@on_virtual_time
async def test_late_news_of_a_lost_worker_call_for_no_patience() -> None:
    cluster = Scripted()
    watching = asyncio.create_task(cluster.pools.watch())
    member = cluster.add("p", PREFILL)
    await asyncio.sleep(2)
    assert member not in cluster.pools.members
    cluster.beat(member)
    assert 1.25 <= await lost_after(cluster) <= 1.52
    watching.cancel()


@on_virtual_time
async def test_who_reports_is_not_silent() -> None:
    cluster = Scripted()
    member = cluster.add("d", DECODE)
    watching = asyncio.create_task(cluster.pools.watch())
    await asyncio.sleep(0)
    for _ in range(10):
        cluster.say("d", Token("nobody's", 1, 0, 1, "length"))
        await asyncio.sleep(0.2)
    assert member in cluster.pools.members
    await asyncio.sleep(1.5)
    assert member not in cluster.pools.members
    watching.cancel()


@on_virtual_time
async def test_a_step_loop_that_stands_still_is_lost_within_three_seconds() -> None:
    cluster = Scripted()
    member = cluster.add("d", DECODE)
    watching = asyncio.create_task(cluster.pools.watch())
    began = clock()
    while member in cluster.pools.members:
        cluster.beat(member)  # always with the same progress
        await asyncio.sleep(0.2)
    assert 2.75 <= clock() - began <= 3.2
    assert isinstance(member.session.lost, WorkerLost) and member.session.lost.cause == "hung"
    again = cluster.add("d", DECODE)
    cluster.beat(again)
    assert not again.usable  # its start is known to hang
    cluster.pools.report(again, Load(2))
    assert again.usable
    watching.cancel()


@on_virtual_time
async def test_a_shunned_pair_is_parted_and_both_are_used() -> None:
    cluster = Scripted()
    cluster.pair()
    route = cluster.pools.route(ASK)
    assert route is not None and names(route) == ("p", "d") and not route.fallback
    cluster.pools.shun(route)
    alone = cluster.pools.route(ASK)
    assert names(alone) == ("", "d") and alone is not None and alone.fallback
    cluster.add("e", DECODE)
    assert names(cluster.pools.route(ASK)) == ("p", "e")
    cluster.add("q", PREFILL)
    kept = route.decode
    assert names(cluster.pools.route(ASK, keep=kept)) == ("q", "d")
    watching = asyncio.create_task(cluster.pools.watch())
    for _ in range(25):
        for number, member in enumerate(cluster.pools.members):
            cluster.pools.report(member, Load(round(clock() * 100) + number))
        await asyncio.sleep(0.25)
    assert names(cluster.pools.route(ASK, [Peer("q", 1)], keep=kept)) == ("p", "d")
    watching.cancel()


@on_virtual_time
async def test_a_decode_worker_alone_is_the_last_choice() -> None:
    cluster = Scripted()
    cluster.add("d", DECODE)
    assert names(cluster.pools.route(ASK)) == ("", "d") and cluster.pools.ready()
    cluster.add("b", BOTH)
    route = cluster.pools.route(ASK)
    assert names(route) == ("", "b") and route is not None and not route.fallback


@on_virtual_time
async def test_news_wakes_who_waits_for_it() -> None:
    cluster = Scripted()
    with pytest.raises(TimeoutError):
        await cluster.pools.changed(1.0)
    waiting = asyncio.create_task(cluster.pools.changed(1.0))
    await asyncio.sleep(0.5)
    member = cluster.add("d", DECODE)
    await waiting
    for news in (lambda: cluster.beat(member), lambda: cluster.pools.leave(member)):
        waiting = asyncio.create_task(cluster.pools.changed(1.0))
        await asyncio.sleep(0.5)
        news()
        await waiting


class Beats:
    """A worker's end of a membership."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Hello | Load | None] = asyncio.Queue()

    async def messages(self) -> AsyncIterator[Hello | Load]:
        while (message := await self.queue.get()) is not None:
            yield message


async def _serve(pools: Pools, beats: Beats) -> None:
    async for name in serve_membership(pools, beats.messages(), "gateway"):
        assert name == "gateway"


@on_virtual_time
async def test_a_membership_lasts_as_long_as_its_stream() -> None:
    cluster = Scripted()
    beats = Beats()
    serving = asyncio.create_task(_serve(cluster.pools, beats))
    beats.queue.put_nowait(hello("d", DECODE))
    beats.queue.put_nowait(Load(3, running=2))
    cluster.orders["d"], cluster.parts["d"] = [], lambda order: ()
    await asyncio.sleep(0.1)
    (member,) = cluster.pools.members
    assert member.load.running == 2
    beats.queue.put_nowait(None)
    await serving
    assert cluster.pools.members == []


@on_virtual_time
async def test_a_membership_ends_when_its_session_does() -> None:
    cluster = Scripted()
    beats = Beats()
    serving = asyncio.create_task(_serve(cluster.pools, beats))
    beats.queue.put_nowait(hello("d", DECODE))
    await asyncio.sleep(0.1)
    cluster.hang_up("d")
    await asyncio.sleep(0.1)
    beats.queue.put_nowait(Load(1))
    await serving


@on_virtual_time
async def test_a_membership_begins_with_a_hello_and_soon() -> None:
    cluster = Scripted()
    beats = Beats()
    beats.queue.put_nowait(Load(1))
    with pytest.raises(HandshakeRefused):
        await _serve(cluster.pools, beats)
    with pytest.raises(HandshakeRefused):
        await _serve(cluster.pools, Beats())
    assert clock() == pytest.approx(HELLO_S)
    with pytest.raises(HandshakeRefused):
        await anext(serve_membership(cluster.pools, _nothing(), "gw"))


@on_virtual_time
async def test_the_status_names_every_worker() -> None:
    cluster = Scripted()
    _, decode = cluster.pair()
    cluster.beat(decode, running=3, free_blocks=42)
    status = cluster.pools.status()
    assert status["ready"] and status["model"] == "m"
    first, second = status["workers"]
    assert (first["name"], first["role"], first["running"], first["free_blocks"]) == (
        "d",
        "decode",
        3,
        42,
    )
    assert (second["name"], second["incarnation"]) == ("p", "0000000000000001")


@on_virtual_time
async def test_closing_leaves_nobody() -> None:
    cluster = Scripted()
    members = cluster.pair()
    await cluster.pools.close()
    assert cluster.pools.members == []
    assert all(member.session.lost for member in members)


async def _nothing() -> AsyncIterator[Hello | Load]:
    for message in ():
        yield message
