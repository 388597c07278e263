"""A whole cluster in one process on virtual time.

Real: pools, sequencer, sessions, worker services, stages, allocators, paged caches, attention,
senders, framed links, receivers, landings. Made here: lines with seeded delays in place of gRPC and
ZeroMQ, one task a worker in place of its step thread, and the model of `hash_model`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from functools import partial
from random import Random
from types import TracebackType
from typing import Any

from cluster.messages import (
    BOTH,
    DECODE,
    PREFILL,
    Hello,
    Landing,
    Order,
    Peer,
    Report,
    Request,
    Token,
)
from cluster.worker import REJOIN_S, WorkerService
from decode.stage import DecodeStage
from engine import loop
from engine.allocator import Allocator
from engine.blocks import BlockPool, root_key
from engine.cache import KVCache
from engine.worker import TICK_S
from gateway.pools import Pools, serve_membership
from gateway.sequencer import Sequencer, Watch
from kvtransfer.frames import Buffer, decode
from kvtransfer.landing import Landings
from kvtransfer.link import FramedLink, Link
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from prefill.service import Across
from prefill.stage import HandoffEnded, PrefillStage
from tests.hash_model import FINGERPRINT, LAYOUT, WINDOWS, HashRunner, expected
from tests.ledger import check_ledger
from tests.virtual import clock


class Line:
    """Delivers in order after a random delay, until it is cut."""

    def __init__(self, cluster: Cluster, deliver: Callable[[Any], None]) -> None:
        self._cluster = cluster
        self._deliver = deliver
        self._last = 0.0
        self._cut = False
        self._under_way: deque[Any] = deque()  # two timers of one instant may fire in any order

    def send(self, item: Any) -> None:
        if self._cut or self._cluster.loses(item):
            return
        self._last = max(self._last, clock() + self._cluster.delay())
        self._under_way.append(item)
        asyncio.get_running_loop().call_at(self._last, self._arrive)

    def cut(self) -> None:
        self._cut = True

    def _arrive(self) -> None:
        item = self._under_way.popleft()
        if not self._cut:
            self._deliver(item)


class Stream:
    """A gateway's session with a worker: orders one way, reports the other, None at the end."""

    def __init__(self, cluster: Cluster, worker: Worker) -> None:
        self._worker = worker
        self._orders: asyncio.Queue[Order | None] = asyncio.Queue()
        self._reports: asyncio.Queue[Report | None] = asyncio.Queue()
        self._there = Line(cluster, self._orders.put_nowait)
        self._back = Line(cluster, self._reports.put_nowait)
        self._tasks: list[asyncio.Task[None]] = []

    async def carry(self, orders: AsyncIterator[Order]) -> AsyncIterator[Report]:
        """The gateway's end."""
        tasks = [asyncio.create_task(self._send(orders)), asyncio.create_task(self._serve())]
        self._tasks = tasks
        self._worker.streams.append(self)
        try:
            while (report := await self._reports.get()) is not None:
                yield report
        finally:
            self._worker.streams.remove(self)
            tasks[0].cancel()
            self._there.cut()
            self._orders.put_nowait(None)

    def break_off(self) -> None:
        """The worker died: its end runs no further, the gateway's end is told."""
        self._there.cut()
        self._back.cut()
        self._tasks[1].cancel()
        self._reports.put_nowait(None)

    async def _send(self, orders: AsyncIterator[Order]) -> None:
        async for order in orders:
            self._there.send(order)

    async def _serve(self) -> None:
        async with aclosing(self._worker.service.session(self._taken())) as reports:  # type: ignore[type-var]
            async for report in reports:
                self._back.send(report)
        self._reports.put_nowait(None)

    async def _taken(self) -> AsyncIterator[Order]:
        while (order := await self._orders.get()) is not None:
            yield order


class LineWire:
    """A Wire to a decode worker in the same process."""

    def __init__(self, cluster: Cluster, worker: Worker | None) -> None:
        self._worker = worker
        self._route = f"{cluster.number()}".encode()
        self._there = Line(cluster, self._arrive)
        self._back = Line(cluster, self._answer)

    async def open(
        self, received: Callable[[list[Buffer]], None], lost: Callable[[str], None]
    ) -> None:
        self._received, self._lost = received, lost
        if self._worker is None or not self._worker.alive:
            lost("connection refused")
        else:
            self._worker.wires[self._route] = self

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        self._there.send([bytes(part) for part in parts])

    def answer(self, parts: tuple[Buffer, Buffer]) -> None:
        self._back.send([bytes(part) for part in parts])

    def close(self) -> None:
        """What was sent before still arrives, as it does over TCP."""
        if self._worker is not None:
            self._worker.wires.pop(self._route, None)
        self._back.cut()

    def fail(self) -> None:
        self._there.cut()
        self.close()
        self._lost("connection lost")

    def _arrive(self, parts: list[Buffer]) -> None:
        if self._worker is not None and self._worker.alive:
            self._worker.receiver.take(self._route, parts)

    def _answer(self, parts: list[Buffer]) -> None:
        self._received(parts)


class Worker:
    """One worker: its service, its stage and, by role, its sender or receiver."""

    def __init__(
        self,
        cluster: Cluster,
        role: str,
        name: str,
        *,
        blocks: int = 64,
        block_size: int = 4,
        budget: int = 16,
        max_sequences: int = 64,
        lease: float = 10.0,
        step_s: float = 0.01,
        chunk_bytes: int = 256,
        credit: int = 1 << 16,
        caching: bool = True,
    ) -> None:
        self._cluster = cluster
        self._step_s = step_s
        self.role = role
        self.alive = True
        self.frozen = False
        self._rejoins = True
        self.left = asyncio.Event()  # it has drained
        self.streams: list[Stream] = []
        self.wires: dict[bytes, LineWire] = {}
        self.pool = BlockPool(blocks, block_size)
        self.allocator = Allocator(self.pool, partial(root_key, FINGERPRINT), caching)
        self.cache = KVCache(LAYOUT, blocks, block_size)
        self.runner = HashRunner(self.cache, ahead=cluster.ahead and role != PREFILL)
        peer = Peer(name, cluster.number())
        address = f"{name}/{peer.incarnation}"
        self.hello = Hello(
            peer,
            role,
            "hash",
            FINGERPRINT,
            LAYOUT,
            control_address=address,
            data_address=address if role == DECODE else "",
            block_size=block_size,
            blocks=blocks,
            max_model_len=blocks * block_size,
        )
        self.hung = False
        self._pulse = 0
        self.service = WorkerService(self.hello, self.post, lambda: self._pulse)
        self._inbox = loop.Inbox()
        self._posted = asyncio.Event()
        later = asyncio.get_running_loop().call_soon
        self.receiver = Receiver(self.hello, self.post, later, credit)
        self.receiver.send = self._answer
        self.sender = Sender(self.cache, self._connect, self._released, chunk_bytes)
        self.landings = Landings(self.pool, self.cache, peer, address, lease)
        self.stage: loop.Stage
        if role == PREFILL:
            self.stage = PrefillStage(
                self.cache,
                self.pool,
                self.allocator,
                WINDOWS,
                Across(self.sender, later),
                budget=budget,
                chunk_bytes=chunk_bytes,
                clock=clock,
            )
        else:
            self.stage = DecodeStage(
                self.cache,
                self.pool,
                self.allocator,
                WINDOWS,
                self.landings,
                budget=budget,
                max_sequences=max_sequences,
                clock=clock,
            )
        self._tasks = [
            asyncio.create_task(work, name=f"{name} {work.__name__}")
            for work in (self._steps(), self._push(), self._join(), self.service.tick(TICK_S))
        ]

    def post(self, order: Any) -> None:
        self._inbox.put(order)
        self._posted.set()

    async def kill(self) -> None:
        """As kill -9 with the connections reset: nothing of it runs or is answered any more."""
        self.alive = False
        for stream in list(self.streams):
            stream.break_off()
        for wire in list(self.wires.values()):
            wire.fail()
        await self.stop()

    def freeze(self) -> None:
        """As SIGSTOP: steps and beats cease, connections stay."""
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        self._posted.set()

    def stay_away(self) -> None:
        """Once lost, it does not join again."""
        self._rejoins = False

    async def drain(self) -> None:
        """As SIGTERM: returns when it has left."""
        await self.service.drain()
        await asyncio.sleep(0.1)  # the grace that its server gives to streams
        await self.kill()
        self.left.set()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _steps(self) -> None:
        """engine.loop.run with a task for its thread; a step's time passes before the step."""
        steps = loop.Steps(self.stage, self.runner)
        progress, busy = 0, False
        while True:
            if not busy:
                await self._posted.wait()
            while self.frozen:
                await asyncio.sleep(TICK_S)
            self._posted.clear()
            for order in self._inbox.take(wait=False):
                steps.settle()
                self.stage.apply(order)
            load = self.stage.load(progress)
            if load.running or load.waiting:
                await self._compute()
            busy = steps.step()
            progress += 1
            check_ledger(self)
            mail, load = self.stage.mail(), self.stage.load(progress)
            self._cluster.trace.append((clock(), self.hello.peer.name, repr(mail)))
            self.service.tell(mail, load)

    async def _compute(self) -> None:
        """A step's time, in layers of at most a second each. A hung one never ends."""
        left = self._step_s
        while left > 0 or self.hung:
            await asyncio.sleep(min(left, 1.0) if not self.hung else 1.0)
            left -= 1.0
            self._pulse += not self.hung

    async def _push(self) -> None:
        async with self.sender:
            await asyncio.Event().wait()

    async def _join(self) -> None:
        while self._rejoins:
            membership = serve_membership(self._cluster.pools, self._beats(), "gateway")
            async with aclosing(membership):
                async for _ in membership:
                    pass
            await asyncio.sleep(REJOIN_S)

    async def _beats(self) -> AsyncIterator[Any]:
        async with aclosing(self.service.membership()) as beats:
            async for beat in beats:
                while self.frozen:
                    await asyncio.sleep(TICK_S)
                yield beat

    def _connect(self, landing: Landing) -> Link:
        target = self._cluster.at.get(landing.address)
        return FramedLink(LineWire(self._cluster, target), self.hello, landing.peer)

    def _answer(self, route: bytes, parts: tuple[Buffer, Buffer]) -> None:
        if route in self.wires:
            self.wires[route].answer(parts)

    def _released(self, handoff: Any, error: Any, carried: Any) -> None:
        self.post(HandoffEnded(*handoff.key, error, carried.bytes))


class Cluster:
    """Used as `async with`; on leaving it stops everything and holds every worker to its ledger."""

    ahead = False
    """Whether a step of a decode worker is launched before the one before it is accepted, as with a
    GPU."""

    def __init__(self, seed: int = 0, *, delay_s: float = 0.002, **settings: Any) -> None:
        self.random = Random(seed)
        self.at: dict[str, Worker] = {}  # by address
        self.trace: list[tuple[float, str, str]] = []
        self.lose: Callable[[Any], bool] = lambda item: False
        self.lost: list[Any] = []
        self._delay_s = delay_s
        self._numbers = 0
        self._settings = settings

    async def __aenter__(self) -> Cluster:
        self.pools = Pools("hash", FINGERPRINT.config, self._connect)
        self.sequencer = Sequencer(self.pools, clock=clock, **self._settings)
        self._watch = asyncio.create_task(self.pools.watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watch.cancel()
        with suppress(asyncio.CancelledError):
            await self._watch
        for worker in self.workers:
            await worker.stop()
            if error is None:
                assert not worker.runner.faults, worker.runner.faults
                check_ledger(worker)
        await self.pools.close()
        await asyncio.sleep(0.1)  # sessions end

    @property
    def workers(self) -> list[Worker]:
        return [worker for worker in self.at.values() if worker.alive]

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def delay(self) -> float:
        return self.random.uniform(0, self._delay_s)

    def loses(self, item: Any) -> bool:
        if isinstance(item, list):
            item = decode(item).fields
        if not self.lose(item):
            return False
        self.lost.append(item)
        return True

    def add(self, role: str, name: str, **options: Any) -> Worker:
        worker = Worker(self, role, name, **options)
        self.at[worker.hello.control_address] = worker
        return worker

    async def pair(self, **options: Any) -> tuple[Worker, Worker]:
        """One prefill and one decode worker that have joined."""
        pair = self.add(PREFILL, "p", **options), self.add(DECODE, "d", **options)
        await self.joined(2)
        return pair

    async def undivided(self, **options: Any) -> Worker:
        worker = self.add(BOTH, "b", **options)
        await self.joined(1)
        return worker

    async def joined(self, count: int) -> None:
        while len(self.pools.members) < count:
            await self.pools.changed(timeout=5)

    async def ask(self, request: Request, watch: Watch | None = None) -> list[Token]:
        tokens: list[Token] = []
        watch = watch or Watch(arrived=clock())
        async with aclosing(self.sequencer.answer(request, watch)) as answer:
            async for token in answer:
                assert token.index == len(tokens), f"{token} after {len(tokens)} tokens"
                tokens.append(token)
        return tokens

    async def check(self, request: Request) -> Watch:
        """Ask, and hold the answer to what the prompt alone says it must be."""
        watch = Watch(arrived=clock())
        tokens = await self.ask(request, watch)
        assert [token.token for token in tokens] == expected(request), request.id
        finishes = [token.finish for token in tokens]
        assert finishes[-1] in ("stop", "length") and not any(finishes[:-1])
        return watch

    def held(self) -> Counter[str]:
        """By worker, the blocks that are neither free nor merely cached."""
        counts = {worker.hello.peer.name: worker.pool.counts() for worker in self.workers}
        return +Counter({name: count.owned + count.promised for name, count in counts.items()})

    async def idle(self, within: float) -> float:
        """Wait until no block is held by anybody; how long it took. Fails after `within`."""
        began = clock()
        while self.held():
            assert clock() - began < within, f"after {within} s still held: {self.held()}"
            await asyncio.sleep(0.01)
        return clock() - began

    async def _connect(self, address: str, orders: AsyncIterator[Order]) -> AsyncIterator[Report]:
        worker = self.at[address]
        if not worker.alive:
            return
        async with aclosing(Stream(self, worker).carry(orders)) as reports:  # type: ignore[type-var]
            async for report in reports:
                yield report
