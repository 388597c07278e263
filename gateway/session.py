"""WorkerSession: the gateway's one stream to one worker. Orders out, events in, by request."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable

import grpc

from cluster import rpc
from cluster.credentials import Credentials
from cluster.errors import BatonError, WorkerLost
from cluster.messages import Cancel, Event, Order, Peer, Report, Token
from cluster.wire import codec

log = logging.getLogger(__name__)

Call = Callable[[AsyncIterator[Order]], AsyncIterator[Report]]
"""Opens the stream: over gRPC, or straight to a worker in the same process."""


class Mailbox:
    """Where one relay gets all that concerns it, from every worker it has to do with.

    A queue with one reader and without a bound: at most one answer is in it. Every token goes
    through one, and asyncio.Queue, made for any number of readers, takes twice as long.
    """

    def __init__(self) -> None:
        self._mail: deque[Event | BatonError] = deque()
        self._new_future = asyncio.get_running_loop().create_future
        self._filled: asyncio.Future[None] | None = None

    def put_nowait(self, mail: Event | BatonError) -> None:
        self._mail.append(mail)
        if self._filled is not None:
            if not self._filled.done():
                self._filled.set_result(None)
            self._filled = None

    def take(self) -> Event | BatonError | None:
        """The oldest, or None while there is none: await `filled` then."""
        return self._mail.popleft() if self._mail else None

    def filled(self) -> asyncio.Future[None]:
        """Done with the next `put_nowait`. Only to be asked for when nothing is there."""
        assert self._filled is None or self._filled.done(), "a mailbox has one reader"
        self._filled = filled = self._new_future()
        return filled


class WorkerSession:
    """Lives from the worker's join to its loss, and never longer than one incarnation.

    `why` tells a stream that broke because the worker died from one that it let fall silent.
    """

    def __init__(self, peer: Peer, call: Call, why: Callable[[], str] = lambda: "died") -> None:
        self.peer = peer
        self.lost: BatonError | None = None
        self._call = call
        self._why = why
        self.reports = 0  # so far: each is a sign of life
        self._orders: asyncio.Queue[Order | None] = asyncio.Queue()
        self._mailboxes: dict[str, Mailbox] = {}

    @property
    def requests(self) -> int:
        """How many of this gateway's requests this worker has to do with now."""
        return len(self._mailboxes)

    def listen(self, request_id: str, mailbox: Mailbox) -> None:
        """Raises WorkerLost if the worker is gone already."""
        if self.lost is not None:
            raise self.lost
        self._mailboxes[request_id] = mailbox

    def forget(self, request_id: str) -> None:
        self._mailboxes.pop(request_id, None)

    def send(self, order: Order) -> None:
        """Never blocks and never fails: a loss shows in the mailbox."""
        self._orders.put_nowait(order)

    async def run(self) -> None:
        """Serve until the stream ends. Whoever listens then is told WorkerLost."""
        try:
            async for report in self._call(self._outgoing()):
                self.reports += 1
                for event in report.events:
                    mailbox = self._mailboxes.get(event.request_id)
                    if mailbox is not None:
                        mailbox.put_nowait(event)
                    elif isinstance(event, Token) and not event.finish:
                        self.send(Cancel(event.request_id, event.attempt))  # ours got lost
        except grpc.aio.AioRpcError as error:
            log.info("session lost", extra={"worker": self.peer.name, "status": str(error.code())})
        finally:
            self.close(self._why())

    def close(self, cause: str) -> None:
        """The worker is gone or fenced. Idempotent."""
        if self.lost is not None:
            return
        self.lost = WorkerLost(
            "The worker that served this request was lost. Please try again.", cause=cause
        )
        self._orders.put_nowait(None)
        for mailbox in self._mailboxes.values():
            mailbox.put_nowait(self.lost)
        self._mailboxes.clear()

    async def _outgoing(self) -> AsyncIterator[Order]:
        while (order := await self._orders.get()) is not None:
            yield order


async def over_grpc(
    address: str, orders: AsyncIterator[Order], credentials: Credentials | None = None
) -> AsyncIterator[Report]:
    """The Call for a worker in another process."""
    async with rpc.open_channel(address, credentials) as channel:
        call = channel.stream_stream(
            codec.SESSION,
            request_serializer=codec.encode_order,
            response_deserializer=codec.decode_report,
        )
        async for report in call(orders):
            yield report
