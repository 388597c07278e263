"""Frames attacked: whatever is done to what travels, only what is intact and current is written.

Honest prefill workers hand KV over all the while (house.py), an adversary does what it can
(adversary.py), and the whole cache is looked at after every frame.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import zmq

from kvtransfer.link import Rooms, Wire
from kvtransfer.shared_memory import SharedMemoryHost, SharedMemoryWire
from kvtransfer.zeromq import ZmqHost, ZmqWire
from tests.chaos.adversary import Adversary, Road, SharedRoad, StraightRoad, ZmqRoad
from tests.chaos.house import HeldWire, House, Prefill
from tests.kvtransfer.fakes import (
    DECODE_PEER,
    MemoryHost,
)
from tests.virtual import run

pytestmark = pytest.mark.timeout(900)

FLAT_BYTES = 48 << 20
"""What the process may grow by during an attack. Kept frames and the allocator's moods are far
below; one frame in a hundred left behind would be far above in the full run."""


def resident() -> int:
    """Bytes of this process."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * mmap.PAGESIZE


async def siege(
    house: House,
    road: Callable[[], Road],
    wire: Callable[[], tuple[Wire, Rooms | None]],
    frames: int,
) -> None:
    """So many frames of the adversary, between those of two honest workers."""
    adversary = Adversary(house, road)
    workers = [Prefill(house, name, wire) for name in ("p0", "p1")]
    begun = 0
    async with AsyncExitStack() as stack:
        stack.callback(adversary.close)
        for worker in workers:
            await stack.enter_async_context(worker.sender)
        while house.attacks < frames:
            await adversary.attack()
            await house.go_on(workers)
            if not begun and house.attacks >= frames // 5:
                begun = resident()
        house.adds_up()
        assert resident() - begun < FLAT_BYTES
        sealed = house.sealed
        while house.sealed < sealed + len(workers):  # an honest peer goes on
            await house.go_on(workers)
    assert house.decode.landings.counters["rearmed"] and house.decode.landings.counters["cancelled"]
    assert house.receiver.counters["dropped"] and house.receiver.counters["fenced"]


@pytest.fixture
def frames(chaos_full: bool) -> int:
    return 100_000 if chaos_full else 8_000


def test_in_memory_with_delays_and_reordering(frames: int) -> None:
    async def attacked() -> House:
        house = House(seed=frames)
        host = MemoryHost(house.receiver)
        routes = iter(range(frames))
        await siege(
            house,
            lambda: StraightRoad(house, b"evil%d" % next(routes)),
            lambda: (HeldWire(house, host), None),
            frames * 8 // 10,
        )
        return house

    house = run(attacked())
    assert set(house.decode.landings.rejected) >= {
        "unknown landing", "wrong incarnation", "stale generation", "stale attempt",
        "outside the landing", "wrong dtype", "wrong size", "overlap", "chunk index used twice",
        "landing is sealed", "manifest does not match", "another manifest sealed it",
    }  # fmt: skip


async def test_over_zeromq(frames: int) -> None:
    house = House(seed=frames + 1)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    host = ZmqHost(context, house.receiver)
    host.start()
    try:
        await siege(
            house,
            lambda: ZmqRoad(house, context, host.address),
            lambda: (ZmqWire(context, host.address), None),
            frames // 10,
        )
    finally:
        host.close()
        context.destroy(linger=0)


async def test_through_shared_memory(frames: int) -> None:
    house = House(seed=frames + 2)
    host = SharedMemoryHost(house.receiver)
    host.start(DECODE_PEER)

    def wire() -> tuple[Wire, Rooms]:
        made = SharedMemoryWire(DECODE_PEER, 1 << 16)
        return made, made

    try:
        await siege(house, lambda: SharedRoad(house), wire, frames // 10)
    finally:
        host.close()
