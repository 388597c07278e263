"""A whole cluster in one process on virtual time.

Real: pools, sequencer, sessions, worker services, stages, allocators, paged caches, attention,
senders, framed links, receivers, landings. Made here: lines with seeded delays in place of gRPC and
ZeroMQ, one task a worker in place of its step thread, and the model of `hash_model`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from functools import partial
from random import Random
from types import TracebackType
from typing import Any

from cluster.errors import BatonError, StartError
from cluster.messages import (
    BOTH,
    DECODE,
    PREFILL,
    Hello,
    Landing,
    Load,
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
from engine.worker import TICK_S, stay_joined
from gateway.pools import Pools
from gateway.relay import Watch
from gateway.sequencer import Sequencer
from kvtransfer.frames import Buffer, decode
from kvtransfer.landing import Landings
from kvtransfer.link import FramedLink, Link
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Carried, Handoff, Sender
from prefill.service import Across
from prefill.stage import HandoffEnded, PrefillStage
from tests.hash_model import FINGERPRINT, LAYOUT, WINDOWS, HashRunner, expected
from tests.ledger import check_ledger
from tests.lines import LOOK_S, Connection, Line, LineWire, Membership, Process, Stream
from tests.virtual import clock


class Gateway(Process):
    """One gateway: its pools and its sequencer. `settings` are the sequencer's."""

    def __init__(self, cluster: Cluster, name: str, settings: dict[str, Any]) -> None:
        super().__init__(name)
        self._cluster = cluster
        self.pools = Pools("hash", FINGERPRINT.config, self._connect)
        self.sequencer = Sequencer(self.pools, clock=clock, **settings)
        self.asking: dict[asyncio.Task[Any], None] = {}  # its clients, who die with it
        self._watch = asyncio.create_task(self.pools.watch())

    def crash(self) -> None:
        """As kill -9: what it had to say is not said."""
        self.alive = False
        self._cluster.died(self)
        for task in self.asking:
            task.cancel()
        self._closing = asyncio.create_task(self.close())

    async def close(self) -> None:
        self._watch.cancel()
        with suppress(asyncio.CancelledError):
            await self._watch
        await self.pools.close()

    async def joined(self, count: int) -> None:
        while len(self.pools.members) < count:
            await self.pools.changed(timeout=5)

    async def _connect(self, address: str, orders: AsyncIterator[Order]) -> AsyncIterator[Report]:
        worker = self._cluster.at[address]
        if not worker.alive or self._cluster.cut_off(self, worker):
            return
        stream = Stream(self._cluster, self, worker)
        async with aclosing(stream.carry(orders)) as reports:  # type: ignore[type-var]
            async for report in reports:
                yield report


class Worker(Process):
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
        super().__init__(name)
        self._cluster = cluster
        self._step_s = step_s
        self.role = role
        self.refused = False  # by every gateway
        self._stopping: asyncio.Task[None] | None = None
        self.leaving = False
        self.left = asyncio.Event()  # it has drained
        self.wires: dict[bytes, LineWire] = {}
        self.pool = BlockPool(blocks, block_size)
        self.allocator = Allocator(self.pool, partial(root_key, FINGERPRINT), caching)
        self.cache = KVCache(LAYOUT, blocks, block_size)
        self.runner = HashRunner(self.cache, ahead=cluster.ahead and role != PREFILL)
        peer = Peer(name, cluster.number())
        self.label = address = f"{name}/{peer.incarnation}"
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
        self.service = WorkerService(self.hello, self.post, lambda: self._pulse, clock=clock)
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
            asyncio.create_task(work)
            for work in (self._run(), self._push(), self.service.tick(TICK_S), self._stay_joined())
        ]

    def post(self, order: Any) -> None:
        self._inbox.put(order)
        self._posted.set()

    def crash(self) -> None:
        """As kill -9: nothing of it runs or is answered any more."""
        if self.alive:
            self.alive = False
            self._cluster.died(self)
            self._stopping = asyncio.create_task(self._stop())

    async def kill(self) -> None:
        """Crash, and wait until it has."""
        self.crash()
        await self.stop()

    def freeze(self) -> None:
        """As SIGSTOP: steps and beats cease, connections stay."""
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        self._posted.set()

    async def drain(self, limit: float = 30.0) -> None:
        """As SIGTERM: returns when it has left, having given back what ran longer than `limit`."""
        self.leaving = True
        await self.service.drain(limit)
        await asyncio.sleep(0.1)  # the grace that its server gives to streams
        await self.kill()
        self.left.set()

    async def stop(self) -> None:
        """Raises what broke any part of it."""
        self._stopping = self._stopping or asyncio.create_task(self._stop())
        await self._stopping

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _run(self) -> None:
        """The process ends with a step loop that finds its device sick."""
        try:
            await self._steps()
        except loop.Sick:
            self.crash()

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
            self._tell(self.stage.mail(), None)
            load = self.stage.load(progress)
            if load.running or load.waiting:
                await self._compute()
            busy = steps.step()
            progress += 1
            check_ledger(self)
            self._tell(self.stage.mail(), self.stage.load(progress))

    def _tell(self, mail: list[Any], load: Load | None) -> None:
        if mail or load is not None:
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

    async def _stay_joined(self) -> None:
        """Whom all gateways refuse ends, as a worker process does."""
        try:
            await stay_joined(self._join, [*map(str, range(len(self._cluster.gateways)))])
        except StartError:
            self.refused = True
            self.crash()

    async def _join(self, slot: str, joined: Callable[[], object]) -> None:
        while not self.leaving:
            gateway = self._cluster.gateways[int(slot)]
            if gateway.alive and not self._cluster.cut_off(self, gateway):
                await Membership(self._cluster, self, gateway).last(joined)
            await asyncio.sleep(REJOIN_S)

    def _connect(self, landing: Landing) -> Link:
        target = self._cluster.at.get(landing.address)
        wire = LineWire(self._cluster, self, target)
        return FramedLink(wire, self.hello, landing.peer, answer_timeout=landing.lease_s)

    def _answer(self, route: bytes, parts: tuple[Buffer, Buffer]) -> None:
        if route in self.wires:
            self.wires[route].answer(parts)

    def _released(self, handoff: Handoff, error: BatonError | None, carried: Carried) -> None:
        self.post(HandoffEnded(handoff.request_id, handoff.attempt, error, carried.bytes))


class Cluster:
    """Used as `async with`; on leaving it stops everything and holds every worker to its ledger."""

    ahead = False
    """Whether a step of a decode worker is launched before the one before it is accepted, as with a
    GPU."""

    def __init__(
        self, seed: int = 0, *, delay_s: float = 0.002, gateways: int = 1, **settings: Any
    ) -> None:
        self.random = Random(seed)
        self.gateways: list[Gateway] = []
        self.at: dict[str, Worker] = {}  # by address
        self.connections: list[Connection] = []
        self.severed: set[tuple[Process, Process]] = set()  # (from, to)
        self.trace: list[tuple[float, str, str]] = []
        self.lose: Callable[[Any], bool] = lambda item: False
        self.lost: list[Any] = []
        self._delay_s = delay_s
        self._numbers = 0
        self._count = gateways
        self._settings = settings

    async def __aenter__(self) -> Cluster:
        names = ["gateway", *(f"gateway{number}" for number in range(1, self._count))]
        self.gateways = [self.gateway(name) for name in names]
        self._keeping = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._keeping.cancel()
        for worker in self.at.values():
            alive = worker.alive
            await worker.stop()
            if error is None:
                assert not worker.runner.faults, worker.runner.faults
                if alive:
                    check_ledger(worker)
        for gateway in self.gateways:
            await gateway.close()
        await asyncio.sleep(0.1)  # sessions end

    @property
    def pools(self) -> Pools:
        return self.gateways[0].pools

    @property
    def sequencer(self) -> Sequencer:
        return self.gateways[0].sequencer

    @property
    def workers(self) -> list[Worker]:
        return [worker for worker in self.at.values() if worker.alive]

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def delay(self) -> float:
        return self.random.uniform(0, self._delay_s)

    def fate(self, line: Line, item: Any) -> list[tuple[Any, float]]:
        """What becomes of an item that is sent: what arrives instead of it, and for what comes out
        of its order how late. Nothing: it is lost."""
        said = decode(item).fields if isinstance(item, list) else item
        if not self.lose(said):
            return [(item, 0.0)]
        self.lost.append(said)
        return []

    def cut_off(self, one: Process, other: Process) -> bool:
        """Whether nothing that needs an answer moves between these two."""
        return (
            not (one.alive and other.alive)
            or one.frozen
            or other.frozen
            or (one, other) in self.severed
            or (other, one) in self.severed
        )

    def sever(self, one: Process, other: Process, both: bool = True) -> None:
        """Cut the way from one to the other, and back."""
        self.severed |= {(one, other), (other, one)} if both else {(one, other)}

    def heal(self, one: Process, other: Process) -> None:
        self.severed -= {(one, other), (other, one)}

    def died(self, process: Process) -> None:
        """Its machine resets its connections; who is cut off from it is left to find out."""
        for connection in [c for c in self.connections if process in c.ends]:
            one, other = connection.ends
            if self.severed & {(one, other), (other, one)}:
                connection.mute()
            else:
                connection.fail()

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for connection in list(self.connections):
                if not self.cut_off(*connection.ends):
                    connection.silent_for = 0.0
                    continue
                connection.silent_for += LOOK_S
                if connection.silent_for > connection.patience:
                    connection.fail("ping timeout")

    def gateway(self, name: str) -> Gateway:
        """A new start of it; the caller puts it into its slot of `gateways`."""
        return Gateway(self, name, self._settings)

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
        """So many workers have joined every gateway."""
        for gateway in self.gateways:
            await gateway.joined(count)

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
