from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from cluster.errors import WorkerLost
from cluster.messages import Cancel, Failed, Order, Peer, Report, Token
from gateway.session import Mailbox, WorkerSession

PEER = Peer("d", 7)


class Worker:
    """The far end: records orders, says what it is told to say."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.reports: asyncio.Queue[Report | BaseException | None] = asyncio.Queue()

    async def call(self, orders: AsyncIterator[Order]) -> AsyncIterator[Report]:
        taking = asyncio.create_task(self._take(orders))
        try:
            while (report := await self.reports.get()) is not None:
                if isinstance(report, BaseException):
                    raise report
                yield report
        finally:
            taking.cancel()

    async def _take(self, orders: AsyncIterator[Order]) -> None:
        async for order in orders:
            self.orders.append(order)


async def _turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_mailbox_wakes_its_one_reader() -> None:
    mailbox = Mailbox()
    assert mailbox.take() is None
    filled = mailbox.filled()
    with pytest.raises(AssertionError, match="one reader"):
        mailbox.filled()
    first, second = Token("a", 1, 0, 5), Token("a", 1, 1, 6)
    mailbox.put_nowait(first)
    mailbox.put_nowait(second)
    await filled
    assert [mailbox.take() for _ in range(3)] == [first, second, None]


async def test_a_reader_that_went_away_hinders_no_other() -> None:
    mailbox = Mailbox()
    mailbox.filled().cancel()
    again = mailbox.filled()
    mailbox.put_nowait(Token("a", 1, 0, 5))
    await again
    assert mailbox.take() == Token("a", 1, 0, 5)


async def test_events_go_to_those_who_listen_for_their_request() -> None:
    worker, a, b = Worker(), Mailbox(), Mailbox()
    session = WorkerSession(PEER, worker.call)
    session.listen("a", a)
    session.listen("b", b)
    assert session.requests == 2
    task = asyncio.create_task(session.run())
    first, second, foreign = Token("a", 1, 0, 5), Failed("b", 1, "full"), Token("c", 1, 0, 6)
    worker.reports.put_nowait(Report((first, second, foreign)))
    await _turns()
    assert (a.take(), b.take()) == (first, second)
    session.forget("a")
    session.forget("a")
    worker.reports.put_nowait(Report((Token("a", 1, 1, 5),)))
    worker.reports.put_nowait(None)
    await task
    assert a.take() is None


async def test_orders_go_out_in_their_order_even_those_given_before_it_runs() -> None:
    worker = Worker()
    session = WorkerSession(PEER, worker.call)
    session.send(Cancel("a"))
    task = asyncio.create_task(session.run())
    session.send(Cancel("b"))
    await _turns()
    assert worker.orders == [Cancel("a"), Cancel("b")]
    worker.reports.put_nowait(None)
    await task


def _rpc_error() -> grpc.aio.AioRpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing)


@pytest.mark.parametrize("end", [None, _rpc_error()], ids=["ended", "failed"])
async def test_the_end_of_the_stream_is_told_to_all_who_listen(end: BaseException | None) -> None:
    worker, mailbox = Worker(), Mailbox()
    session = WorkerSession(PEER, worker.call)
    session.listen("a", mailbox)
    worker.reports.put_nowait(end)
    await session.run()
    assert isinstance(mailbox.take(), WorkerLost)
    assert isinstance(session.lost, WorkerLost)
    assert session.requests == 0
    with pytest.raises(WorkerLost):
        session.listen("b", mailbox)
    session.send(Cancel("a"))  # goes nowhere, and does not fail
    session.close("died")
    assert mailbox.take() is None


async def test_cancelling_it_is_a_loss_too() -> None:
    worker, mailbox = Worker(), Mailbox()
    session = WorkerSession(PEER, worker.call)
    session.listen("a", mailbox)
    task = asyncio.create_task(session.run())
    await _turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(mailbox.take(), WorkerLost)
