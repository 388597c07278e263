"""What lies between the processes of tests.cluster_in_process: lines with seeded delays.

A Line carries messages one way. A Connection is what two processes share, with a line each way: a
gateway's session with a worker, a worker's membership of a gateway, a sender's wire to a receiver.
It fails as gRPC's and ZeroMQ's connections do: at once when a process dies, and once nothing comes
through any more for as long as their keepalives and heartbeats wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from cluster.errors import HandshakeRefused, WorkerLost
from cluster.messages import Hello, Load, Order, Report
from gateway.pools import serve_membership
from kvtransfer.frames import Buffer
from kvtransfer.zeromq import SILENCE_MS
from tests.virtual import clock

if TYPE_CHECKING:
    from tests.cluster_in_process import Cluster, Gateway, Worker

KEEPALIVE_S = 2.5
"""gRPC's, as cluster.rpc sets it: a stream through which nothing comes for so long ends."""
HEARTBEAT_S = SILENCE_MS / 1000
"""ZeroMQ's, likewise."""
LOOK_S = 0.1


class Process:
    """One start of one process: what lines and connections lie between."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.label = name
        self.alive = True
        self.frozen = False


class Line:
    """Delivers in order after a random delay, until it is cut.

    While either end is frozen, or the way there is severed, everything waits.
    """

    def __init__(
        self,
        cluster: Cluster,
        source: Process,
        target: Process,
        kind: str,
        deliver: Callable[[Any], None],
    ) -> None:
        self.source = source
        self.target = target
        self.kind = kind  # order, report, beat, welcome, frame or answer
        self.connection: Connection | None = None
        self._cluster = cluster
        self._deliver = deliver
        self._last = 0.0
        self._cut = False
        self._under_way: deque[Any] = deque()  # two timers of one instant may fire in any order

    def send(self, item: Any) -> None:
        """None, the end of a stream, is never lost: it comes with the connection's own end."""
        if self._cut:
            return
        for sent, late in [(item, 0.0)] if item is None else self._cluster.fate(self, item):
            if late:
                at = max(self._last, clock()) + late
                asyncio.get_running_loop().call_at(at, self._arrive_late, sent)
                continue
            self._last = max(self._last, clock() + self._cluster.delay())
            self._under_way.append(sent)
            asyncio.get_running_loop().call_at(self._last, self._arrive)

    def hold(self, seconds: float) -> None:
        """Nothing arrives for so long, and then all of it, in order."""
        self._last = max(self._last, clock()) + seconds

    def cut(self) -> None:
        self._cut = True

    def _arrive(self) -> None:
        if self._blocked:
            asyncio.get_running_loop().call_later(LOOK_S, self._arrive)
            return
        item = self._under_way.popleft()
        if not self._cut:
            self._deliver(item)

    def _arrive_late(self, item: Any) -> None:
        """Out of order: what came after it may have overtaken it."""
        if self._blocked and not self._cut:
            asyncio.get_running_loop().call_later(LOOK_S, self._arrive_late, item)
        elif not self._cut:
            self._deliver(item)

    @property
    def _blocked(self) -> bool:
        severed = (self.source, self.target) in self._cluster.severed
        return self.source.frozen or self.target.frozen or severed


class Connection:
    """What two processes have between them. It fails at both ends once nothing has come through
    either way for as long as `patience`: cut one way only, acknowledgements are missing."""

    patience = KEEPALIVE_S

    def __init__(self, cluster: Cluster, one: Process, other: Process) -> None:
        self.ends = one, other
        self.silent_for = 0.0
        self._lines: list[Line] = []
        self._cluster = cluster
        cluster.connections.append(self)

    def line(
        self, source: Process, target: Process, kind: str, deliver: Callable[[Any], None]
    ) -> Line:
        line = Line(self._cluster, source, target, kind, deliver)
        line.connection = self
        self._lines.append(line)
        return line

    def mute(self) -> None:
        """Nothing moves any more, and nobody is told."""
        for line in self._lines:
            line.cut()

    def fail(self, reason: str = "connection reset") -> None:
        """Both ends are told."""
        raise NotImplementedError

    def gone(self) -> None:
        if self in self._cluster.connections:
            self._cluster.connections.remove(self)


class Stream(Connection):
    """A gateway's session with a worker: orders one way, reports the other, None at the end."""

    def __init__(self, cluster: Cluster, gateway: Gateway, worker: Worker) -> None:
        super().__init__(cluster, gateway, worker)
        self._worker = worker
        self._orders: asyncio.Queue[Order | None] = asyncio.Queue()
        self._reports: asyncio.Queue[Report | Exception | None] = asyncio.Queue()
        self._there = self.line(gateway, worker, "order", self._orders.put_nowait)
        self._back = self.line(worker, gateway, "report", self._reports.put_nowait)
        self._serving = asyncio.create_task(self._serve())

    async def carry(self, orders: AsyncIterator[Order]) -> AsyncIterator[Report]:
        """The gateway's end. Raises AioRpcError when the connection fails."""
        sending = asyncio.create_task(self._send(orders))
        try:
            while (report := await self._reports.get()) is not None:
                if isinstance(report, Exception):
                    raise report
                yield report
        finally:
            sending.cancel()
            self._back.cut()
            self._there.send(None)

    def fail(self, reason: str = "connection reset") -> None:
        self.mute()
        self._orders.put_nowait(None)
        nothing = Metadata()
        self._reports.put_nowait(AioRpcError(StatusCode.UNAVAILABLE, nothing, nothing, reason))

    async def _send(self, orders: AsyncIterator[Order]) -> None:
        async for order in orders:
            self._there.send(order)

    async def _serve(self) -> None:
        async with aclosing(self._worker.service.session(self._taken())) as reports:  # type: ignore[type-var]
            async for report in reports:
                self._back.send(report)
        self._back.send(None)
        self.gone()

    async def _taken(self) -> AsyncIterator[Order]:
        while (order := await self._orders.get()) is not None:
            yield order


class Membership(Connection):
    """A worker's stream to one gateway's registry: Hello and loads one way, a welcome back."""

    def __init__(self, cluster: Cluster, worker: Worker, gateway: Gateway) -> None:
        super().__init__(cluster, worker, gateway)
        self._worker, self._gateway = worker, gateway
        self._beats: asyncio.Queue[Hello | Load | None] = asyncio.Queue()
        self._told: asyncio.Queue[str | HandshakeRefused | None] = asyncio.Queue()
        self._welcome = asyncio.Event()
        self._there = self.line(worker, gateway, "beat", self._beats.put_nowait)
        self._back = self.line(gateway, worker, "welcome", self._told.put_nowait)
        self._serving = asyncio.create_task(self._serve())

    async def last(self, joined: Callable[[], object]) -> None:
        """The worker's end, until it is over. Raises HandshakeRefused."""
        sending = asyncio.create_task(self._send())
        try:
            while (told := await self._told.get()) is not None:
                if isinstance(told, HandshakeRefused):
                    raise told
                self._welcome.set()
                joined()
        finally:
            sending.cancel()
            self._back.cut()
            self._there.send(None)

    def fail(self, reason: str = "connection reset") -> None:
        self.mute()
        self._beats.put_nowait(None)
        self._told.put_nowait(None)

    async def _send(self) -> None:
        async with aclosing(self._worker.service.membership(self._welcome)) as beats:
            async for beat in beats:
                self._there.send(beat)

    async def _serve(self) -> None:
        gateway = self._gateway
        try:
            welcome = serve_membership(gateway.pools, self._taken(), gateway.name)
            async with aclosing(welcome):
                async for name in welcome:
                    self._back.send(name)
        except HandshakeRefused as refused:
            self._back.send(refused)
        self._back.send(None)
        self.gone()

    async def _taken(self) -> AsyncIterator[Hello | Load]:
        while (beat := await self._beats.get()) is not None:
            yield beat


class LineWire(Connection):
    """A Wire from a prefill worker to a decode worker."""

    patience = HEARTBEAT_S

    def __init__(self, cluster: Cluster, source: Worker, target: Worker | None) -> None:
        self._source = source
        self._target = target
        self._route = f"{cluster.number()}".encode()
        self._over = target is None or not target.alive
        if target is not None:
            super().__init__(cluster, source, target)
            self._there = self.line(source, target, "frame", self._arrive)
            self._back = self.line(target, source, "answer", self._answer)

    async def open(
        self, received: Callable[[list[Buffer]], None], lost: Callable[[str], None]
    ) -> None:
        self._received, self._lost = received, lost
        while not self._over and self._cluster.cut_off(*self.ends):
            await asyncio.sleep(LOOK_S)
        if self._over or self._target is None:
            self._over = True
            raise WorkerLost("connection refused")
        self._target.wires[self._route] = self

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        if self._over:
            raise WorkerLost("cannot send")
        self._there.send([bytes(part) for part in parts])

    def answer(self, parts: tuple[Buffer, Buffer]) -> None:
        self._back.send([bytes(part) for part in parts])

    def close(self) -> None:
        """What was sent before still arrives, as it does over TCP."""
        self._over = True
        if self._target is not None:
            self._target.wires.pop(self._route, None)
            self._back.cut()
            self.gone()

    def fail(self, reason: str = "connection lost") -> None:
        self.mute()
        self.close()
        if hasattr(self, "_lost"):
            self._lost(reason)

    def _arrive(self, parts: list[Buffer]) -> None:
        if self._target is not None and self._target.alive:
            self._target.receiver.take(self._route, parts)

    def _answer(self, parts: list[Buffer]) -> None:
        self._received(parts)
