"""A worker's life around its parts, with parts that do nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cluster.config import WorkerConfig
from cluster.errors import HandshakeRefused, StartError
from cluster.messages import DECODE, Fingerprint, Hello, KVLayout, LayerGroup, Load, Peer
from cluster.worker import WorkerService
from engine import loop, worker
from engine.batch import Plan
from tests.virtual import clock, on_virtual_time

HELLO = Hello(
    Peer("d", 3),
    DECODE,
    "m",
    Fingerprint("config", "weights"),
    KVLayout((LayerGroup(1, 1, 4),), "float32"),
    blocks=9,
)


class Idle:
    """A stage that never has anything to do, and says that `running` sequences run."""

    def __init__(self, running: int = 0) -> None:
        self._running = running

    def apply(self, order: Any) -> None:
        if isinstance(order, Exception):
            raise order

    def plan(self) -> Plan:
        return Plan()

    def mail(self) -> list[Any]:
        return []

    def load(self, progress: int) -> Load:
        return Load(progress, running=self._running)


class Room:
    def __init__(self, stage: Idle) -> None:
        self.stage: Any = stage
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def open(self) -> str:
        return ""

    async def serve(self) -> None:
        await self.failure

    def close(self) -> None:
        return


class Service(WorkerService):
    """Gateways are names: "yes" takes it, any other refuses."""

    def __init__(self, inbox: loop.Inbox) -> None:
        super().__init__(HELLO, inbox.put)
        self.leave = asyncio.Event()

    async def join(self, address: str, joined: Callable[[], object] = lambda: None) -> None:
        if address != "yes":
            raise HandshakeRefused("a misfit")
        joined()
        await self.leave.wait()
        raise HandshakeRefused("no more")


class Worker:
    def __init__(self, running: int = 0, **options: Any) -> None:
        self.inbox = loop.Inbox()
        self.room = Room(Idle(running))
        self.service = Service(self.inbox)
        self.stopping = asyncio.Event()
        self.config = WorkerConfig(**{"join": ("yes",), **options})

    async def live(self) -> None:
        def run(tell: loop.Tell) -> None:
            runner: Any = None
            loop.run(self.room.stage, runner, self.inbox, tell)

        await worker._live(self.config, self.stopping, self.service, self.room, run, self.inbox)


async def test_told_to_stop_while_it_loads_it_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loading, loaded = asyncio.Event(), threading.Event()
    event_loop = asyncio.get_running_loop()

    def load(*_: Any) -> Any:
        event_loop.call_soon_threadsafe(loading.set)
        loaded.wait()
        raise AssertionError("nobody is left to hear this")

    monkeypatch.setattr(worker, "_load", load)
    stopping = asyncio.Event()
    try:
        serving = asyncio.create_task(worker.serve(WorkerConfig(), stopping, _no_room))
        await loading.wait()
        stopping.set()
        async with asyncio.timeout(30):
            assert await serving == 0
    finally:
        loaded.set()


def _no_room(parts: worker.Parts) -> worker.Room:
    raise AssertionError("there is no model to serve")


async def test_what_fails_while_it_loads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Any:
        raise StartError("no such weights")

    monkeypatch.setattr(worker, "_load", load)
    with pytest.raises(StartError, match="no such weights"):
        await worker.serve(WorkerConfig(), asyncio.Event(), _no_room)


async def test_cores_that_are_not_there() -> None:
    with pytest.raises(StartError, match="--pin: 99999 is not one of"):
        await worker.serve(WorkerConfig(pin=(99999,)), asyncio.Event(), _no_room)


async def test_one_gateway_that_refuses_leaves_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    alive = Worker(join=("no", "yes"))
    living = asyncio.create_task(alive.live())
    while not caplog.records:
        await asyncio.sleep(0)
    assert not living.done()
    [record] = caplog.records
    assert vars(record)["address"] == "no" and vars(record)["reason"] == "a misfit"
    alive.service.leave.set()
    with pytest.raises(StartError) as caught:
        await living
    assert caught.value.message == (
        "no refuses this worker: a misfit; yes refuses this worker: no more"
    )


async def test_the_only_gateway_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """The error is the one line that tells it."""
    with pytest.raises(StartError, match=r"^no refuses this worker: a misfit$"):
        await Worker(join=("no",)).live()
    assert caplog.records == []


@on_virtual_time
async def test_a_gateway_that_refused_is_asked_again_and_its_old_word_forgotten() -> None:
    asked: list[tuple[float, str]] = []
    refusing = {"a"}

    async def join(address: str, joined: Callable[[], object]) -> None:
        asked.append((clock(), address))
        while address not in refusing:
            joined()
            await asyncio.sleep(1)
        raise HandshakeRefused("a newer start is there")

    staying = asyncio.create_task(worker.stay_joined(join, ["a", "b"]))
    await asyncio.sleep(1)
    refusing.clear()
    await asyncio.sleep(6)
    assert asked == [(0.0, "a"), (0.0, "b"), (worker.REFUSED_S, "a")]
    refusing.add("b")
    await asyncio.sleep(3)
    assert not staying.done()
    refusing.add("a")
    with pytest.raises(StartError, match=r"^a refuses .*; b refuses "):
        await staying


async def test_nothing_of_it_is_left_when_the_drain_takes_too_long() -> None:
    busy = Worker(running=1, shutdown_timeout=0.01)
    busy.stopping.set()
    await busy.live()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_part_that_breaks_ends_it() -> None:
    broken = Worker()
    broken.room.failure.set_exception(OSError("the link is gone"))
    with pytest.raises(OSError, match="the link is gone"):
        await broken.live()


@pytest.mark.parametrize("draining", [False, True])
async def test_a_step_loop_that_breaks_ends_it(
    draining: bool, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Worker(running=1)
    if draining:
        broken.stopping.set()
    broken.inbox.put(ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError, match="bug"):
        await broken.live()
    assert [record.message for record in caplog.records] == ["step loop broke"]


def test_graphs_are_captured_for_batches_that_can_be() -> None:
    sizes = (1, 2, 4, 8, 16, 24, 32)
    assert worker._graph_sizes(WorkerConfig(max_num_seqs=8), sizes) == (1, 2, 4, 8)
    assert worker._graph_sizes(WorkerConfig(max_num_seqs=9), sizes) == (1, 2, 4, 8, 16)
    assert worker._graph_sizes(WorkerConfig(enforce_eager=True), sizes) == ()
