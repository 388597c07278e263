from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from cluster import rpc
from cluster.errors import HandshakeRefused
from cluster.messages import (
    DECODE,
    Cancel,
    Fingerprint,
    Hello,
    KVLayout,
    LayerGroup,
    Load,
    Order,
    Peer,
    Report,
    Token,
)
from cluster.orders import Drain, GiveBack, Ordered, SessionClosed, Tick
from cluster.wire import codec
from cluster.worker import GIVE_BACK_S, HEARTBEAT_S, LINGER_S, WorkerService
from tests.virtual import clock, on_virtual_time

HELLO = Hello(
    Peer("d", 3),
    DECODE,
    "m",
    Fingerprint("config", "weights"),
    KVLayout((LayerGroup(1, 1, 4),), "float32"),
    blocks=9,
)


class Gateway:
    """The far end of one session."""

    def __init__(self, service: WorkerService) -> None:
        self.orders: asyncio.Queue[Order | None] = asyncio.Queue()
        self.reports: list[Report] = []
        self.task = asyncio.create_task(self._listen(service))

    async def _listen(self, service: WorkerService) -> None:
        async for report in service.session(self._orders()):
            self.reports.append(report)

    async def _orders(self) -> AsyncIterator[Order]:
        while (order := await self.orders.get()) is not None:
            yield order


def _service() -> tuple[WorkerService, list[Any]]:
    posted: list[Any] = []
    return WorkerService(HELLO, posted.append, clock=clock), posted


@on_virtual_time
async def test_orders_are_posted_with_their_session_and_when_they_came() -> None:
    service, posted = _service()
    first, second = Gateway(service), Gateway(service)
    await asyncio.sleep(0)
    began = clock()
    first.orders.put_nowait(Cancel("a"))
    await asyncio.sleep(0.1)
    second.orders.put_nowait(Cancel("b"))
    await asyncio.sleep(0.1)
    assert posted == [Ordered(1, Cancel("a"), began), Ordered(2, Cancel("b"), began + 0.1)]
    for gateway in (first, second):
        gateway.orders.put_nowait(None)
        await gateway.task


@on_virtual_time
async def test_each_gateway_gets_one_report_a_step_with_its_own_events() -> None:
    service, _ = _service()
    first, second = Gateway(service), Gateway(service)
    await asyncio.sleep(0.1)
    a, b, c = Token("a", 1, 0, 5), Token("b", 1, 0, 6), Token("c", 1, 0, 7)
    service.tell([(1, a), (2, b), (1, c), (99, b)], Load(1))
    service.tell([], Load(2))
    await asyncio.sleep(0.1)
    assert first.reports == [Report((a, c))]
    assert second.reports == [Report((b,))]
    for gateway in (first, second):
        gateway.orders.put_nowait(None)
        await gateway.task


@on_virtual_time
async def test_a_session_ends_when_the_gateway_says_no_more() -> None:
    service, posted = _service()
    gateway = Gateway(service)
    gateway.orders.put_nowait(Cancel("a"))
    gateway.orders.put_nowait(None)
    await gateway.task
    assert posted == [Ordered(1, Cancel("a"), clock()), SessionClosed(1)]
    service.tell([(1, Token("a", 1, 0, 5))], Load(1))  # to nobody


@on_virtual_time
async def test_a_session_that_is_cut_is_closed_once_and_takes_no_more_orders() -> None:
    service, posted = _service()
    gateway = Gateway(service)
    await asyncio.sleep(0.1)
    gateway.task.cancel()
    gateway.orders.put_nowait(Cancel("a"))
    await asyncio.gather(gateway.task, return_exceptions=True)
    await asyncio.sleep(0.1)
    assert posted == [SessionClosed(1)]


@on_virtual_time
async def test_a_member_says_hello_and_once_it_is_welcome_its_load() -> None:
    service, _ = _service()
    welcome = asyncio.Event()
    membership = service.membership(welcome)
    assert await anext(membership) == HELLO
    load = asyncio.ensure_future(anext(membership))
    await asyncio.sleep(HEARTBEAT_S)
    assert not load.done(), "who is refused meanwhile hears why"
    welcome.set()
    assert await load == Load(0, free_blocks=9)
    service.tell([], Load(5, running=2))
    began = clock()
    assert await anext(membership) == Load(5, running=2)
    assert clock() - began == HEARTBEAT_S
    await membership.aclose()


async def test_nothing_is_left_of_a_call_that_was_refused() -> None:
    """A task that waited for ever would be collected one day, with a line in the log."""

    async def refuse(messages: AsyncIterator[Any], _: object) -> AsyncGenerator[str, None]:
        await anext(messages)
        seen.extend(senders())
        raise HandshakeRefused("not you")
        yield ""

    def senders() -> list[asyncio.Task[Any]]:
        return [one for one in asyncio.all_tasks() if "_consume_request" in repr(one.get_coro())]

    seen: list[asyncio.Task[Any]] = []
    server = rpc.new_server()
    membership = codec.decode_membership, codec.encode_welcome
    server.add_generic_rpc_handlers((rpc.stream_handler(codec.JOIN, refuse, *membership),))
    port = rpc.listen(server, "127.0.0.1:0", "--port")
    await server.start()
    with pytest.raises(HandshakeRefused, match="not you"):
        await _service()[0].join(f"127.0.0.1:{port}")
    assert len(seen) == 1
    await asyncio.wait(seen)
    await server.stop(None)


@on_virtual_time
async def test_ticks_are_posted() -> None:
    service, posted = _service()
    ticking = asyncio.create_task(service.tick(0.25))
    await asyncio.sleep(1.1)
    ticking.cancel()
    assert posted == [Tick()] * 4


@on_virtual_time
async def test_it_has_drained_when_nothing_runs_waits_or_is_promised() -> None:
    service, posted = _service()
    draining = asyncio.create_task(service.drain(limit=10.0))
    await asyncio.sleep(0.1)
    assert posted == [Drain()]
    for number, busy in enumerate(
        (
            Load(1, running=1),
            Load(2, waiting=1),
            Load(3, promised_blocks=1),
            Load(4, owned_blocks=1),
        )
    ):
        service.tell([], busy)
        assert service.load.draining and service.load.progress == number + 1
        await asyncio.sleep(0.1)
        assert not draining.done()
    service.tell([], Load(5, cached_blocks=3))
    await asyncio.sleep(LINGER_S + 0.1)
    service.tell([], Load(6, promised_blocks=1))  # was on its way when the drain began
    await asyncio.sleep(0.1)
    service.tell([], Load(7, cached_blocks=3))
    idle = clock()
    await asyncio.sleep(LINGER_S + 0.1)
    assert not draining.done()
    service.tell([], Load(8, cached_blocks=3))
    await draining
    assert posted == [Drain()]
    assert clock() - idle == pytest.approx(LINGER_S + 0.1)


@on_virtual_time
async def test_what_does_not_end_in_time_is_given_back() -> None:
    service, posted = _service()
    draining = asyncio.create_task(service.drain(limit=10.0))
    await asyncio.sleep(9.9)
    service.tell([], Load(1, running=1))
    assert posted == [Drain()]
    await asyncio.sleep(0.2)
    assert posted == [Drain(), GiveBack()]
    for number in (2, 3):
        service.tell([], Load(number))
        assert not draining.done()
        await asyncio.sleep(LINGER_S + 0.1)
    await draining


@on_virtual_time
async def test_a_drain_has_an_end_even_if_nothing_moves() -> None:
    service, _ = _service()
    began = clock()
    await service.drain(limit=10.0)
    assert clock() - began == 10.0 + GIVE_BACK_S


async def test_orders_that_cannot_be_read_end_the_session_and_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken() -> AsyncIterator[Order]:
        raise ValueError("no order")
        yield

    service, posted = _service()
    assert [report async for report in service.session(broken())] == []
    assert posted == [SessionClosed(1)]
    [record] = caplog.records
    assert record.exc_info is not None and str(record.exc_info[1]) == "no order"
