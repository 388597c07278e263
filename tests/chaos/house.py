"""A decode worker in the middle of it, honest workers around it, and the oracle that watches.

After every single frame the whole cache is held against a model that obeys nothing but undamaged
frames of the landing's current writer.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from random import Random

import numpy as np
import torch

from cluster.errors import BatonError, BlocksExhausted, WorkerLost
from cluster.lifecycle import LandingState
from cluster.messages import Landing, Peer, Request
from engine.blocks import Block
from engine.cache import KVCache
from kvtransfer.frames import (
    Buffer,
    Chunk,
    Frame,
    Greeting,
    decode,
)
from kvtransfer.landing import Site
from kvtransfer.link import FramedLink, Link, Rooms, Wire
from kvtransfer.receiver import MAX_KNOWN
from kvtransfer.sender import Announcement, Carried, Handoff, Sender
from tests.kvtransfer.fakes import (
    LAYOUT,
    DecodeSide,
    MemoryHost,
    MemoryWire,
    content,
    prefill_hello,
)

BLOCKS, BLOCK_SIZE = 24, 4
KEPT_FRAMES = 400

Key = tuple[bytes, bytes]


class Prefill:
    """One honest prefill worker: a cache full of noise, and one handoff after the other."""

    def __init__(self, house: House, name: str, wire: Callable[[], tuple[Wire, Rooms | None]]):
        self.house = house
        self.hello = prefill_hello(peer=Peer(name, 1))
        self.cache = KVCache(LAYOUT, 16, 3)
        for part in pages(self.cache):
            part[:] = house.noise.integers(0, 256, part.shape)
        self._wire = wire
        self._blocks = [Block(number, 0) for number in range(16)]
        self.sender = Sender(self.cache, self._connect, self._released, chunk_bytes=200)
        self.name = ""
        self.attempt = 0
        self.tokens = 0
        self.fate = ""  # what befalls it half-way
        self.over = True  # the sender's side of the current handoff
        self.errors: list[BatonError] = []

    def _connect(self, landing: Landing) -> Link:
        wire, rooms = self._wire()
        tapped = Tapped(self.house, wire)
        return FramedLink(tapped, self.hello, landing.peer, rooms=rooms, answer_timeout=600.0)

    def _released(self, handoff: Handoff, error: BatonError | None, carried: Carried) -> None:
        if handoff.key == (self.name, self.attempt):
            self.over = True
            if error is not None and handoff.key not in self.house.decode.sealed:
                self.errors.append(error)

    def begin(self, name: str, tokens: int) -> None:
        """Raises BlocksExhausted."""
        self.name, self.tokens, self.attempt = name, tokens, 0
        self.house.random.shuffle(self._blocks)
        self.fate = self.house.random.choice(["", "", "again", "cancel"])
        self.again()

    def again(self) -> None:
        """The next attempt of the same request, into the same landing if that is still open."""
        asked = Request(self.name, tuple(range(self.tokens)))
        landing = self.house.decode.landings.promise(asked, self.attempt + 1, 0.0)
        self.sender.cancel(self.name, self.attempt)
        self.attempt += 1
        self.over = False
        self.sender.open(Handoff(self.name, self.attempt, landing, self.tokens))
        slots = self.cache.slots_of(self._blocks, 0, self.tokens)
        announcement = Announcement(range(LAYOUT.layers), range(self.tokens), slots)
        self.sender.announce(self.name, self.attempt, announcement)
        self.sender.finish(self.name, self.attempt)

    def content(self) -> bytes:
        return content(self.cache, self._blocks, 0, self.tokens)


class Tapped:
    """A Wire whose frames the adversary sees before they travel."""

    def __init__(self, house: House, wire: Wire) -> None:
        self._house, self._wire = house, wire

    async def open(
        self, received: Callable[[list[Buffer]], None], lost: Callable[[str], None]
    ) -> None:
        await self._wire.open(received, lost)

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        assert isinstance(parts[1], bytes | memoryview)
        self._house.seen((bytes(parts[0]), bytes(parts[1])))
        self._wire.send(parts)

    def close(self) -> None:
        self._wire.close()


class HeldWire(MemoryWire):
    """In memory, and a frame arrives when the adversary lets it: late, and in another order."""

    def __init__(self, house: House, host: MemoryHost) -> None:
        super().__init__(host)
        self._house = house

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        if self._route not in self._host.wires:
            raise WorkerLost("connection lost")
        self._house.held.append((self._route, [bytes(part) for part in parts]))


class House:
    """A decode worker in the middle of it, with the oracle that looks at each frame's effect."""

    def __init__(self, seed: int) -> None:
        self.random, self.noise = Random(seed), np.random.default_rng(seed)
        self.decode = DecodeSide(BLOCK_SIZE, BLOCKS, credit=1000)  # several turns for each handoff
        self.receiver = self.decode.receiver
        self.model = KVCache(LAYOUT, BLOCKS, BLOCK_SIZE)
        self._pages, self._modelled = pages(self.decode.cache), pages(self.model)
        for page, modelled in zip(self._pages, self._modelled, strict=True):
            page[:] = modelled[:] = self.noise.integers(0, 256, page.shape)
        self._take = self.receiver.take
        self.receiver.take = self.take  # type: ignore[method-assign]
        self.sent: set[Key] = set()  # by honest workers
        self.kept: deque[Key] = deque(maxlen=KEPT_FRAMES)  # those of them that may come again
        self.held: list[tuple[bytes, list[Buffer]]] = []
        self.honest: dict[bytes, bool] = {}  # routes
        self.taken = 0
        self.attacks = 0  # taken from others than honest workers
        self.intrusions = 0  # handshakes of the adversary
        self.sealed = 0
        self.owners: deque[tuple[Site, bytes]] = deque()  # running sequences and their KV
        self.requests = 0

    def seen(self, key: Key) -> None:
        self.sent.add(key)
        if not isinstance(frame_of(key).fields, Greeting):
            self.kept.append(key)

    def take(self, route: bytes, parts: list[Buffer]) -> None:
        """One frame arrives; afterwards nothing but what may have changed has changed."""
        key = (bytes(parts[0]), bytes(parts[1])) if len(parts) == 2 else (b"", b"")
        pristine = key in self.sent
        if route not in self.honest:
            self.honest[route] = pristine and isinstance(frame_of(key).fields, Greeting)
        chunks, told = self.decode.landings.counters["chunks"], len(self.decode.sealed)
        obeyed = self._obeyed(route, key) if pristine else None
        self._take(route, parts)
        assert self.decode.landings.counters["chunks"] - chunks == (obeyed is not None)
        if obeyed is not None:
            chunk, site = obeyed
            slots = self.model.slots_of(site.blocks, chunk.box.tokens.start, chunk.box.tokens.stop)
            self.model.scatter(chunk.box.layers, slots, key[1], chunk.box.heads)
        for page, modelled in zip(self._pages, self._modelled, strict=True):
            assert np.array_equal(page, modelled), "KV was written that should not have been"
        if len(self.decode.sealed) > told:
            assert pristine, "sealed by a frame that no honest worker sent"
            self.sealed += 1
        self.taken += 1
        self.attacks += not self.honest[route]

    def _obeyed(self, route: bytes, key: Key) -> tuple[Chunk, Site] | None:
        """The chunk that is to be written, and where: a known writer's, current, not there yet."""
        chunk = frame_of(key).fields
        if route not in self.receiver._links or not isinstance(chunk, Chunk):
            return None
        site = self.decode.landings._by_id.get(chunk.address.landing)
        if site is None or site.state is not LandingState.PROMISED or chunk.index in site.written:
            return None
        return (chunk, site) if chunk.address == site.address else None

    async def more_than(self, attacks: int) -> None:
        """Wait until so many and one have been looked at."""
        async with asyncio.timeout(30):
            while self.attacks == attacks:
                await asyncio.sleep(0)

    def manage(self, worker: Prefill) -> None:
        """What a decode worker does between frames: start what is sealed, end, cancel, promise."""
        landings, random = self.decode.landings, self.random
        site = landings._sites.get(worker.name)
        if site is not None and site.state is LandingState.SEALED:
            if random.random() < 0.97:
                return  # its start is on the way
            started = landings.start(worker.name, worker.attempt)
            assert started is not None
            assert self.decode.content(started.blocks, 0, worker.tokens) == worker.content()
            self.owners.append((started, worker.content()))
        elif site is not None and site.written and worker.fate:
            fate, worker.fate = worker.fate, ""
            if fate == "again":
                worker.again()
            else:
                landings.cancel(worker.name, worker.attempt)
                worker.sender.cancel(worker.name, worker.attempt)
        elif site is None and worker.over:
            assert not worker.errors or "cancelled" in str(worker.errors[-1]), worker.errors
            self.requests += 1
            try:
                worker.begin(f"r{self.requests}", random.randrange(1, 22))
            except BlocksExhausted:
                self.end_one()
        if len(self.owners) > 2 and random.random() < 0.2:
            self.end_one()

    def end_one(self) -> None:
        """A sequence ends, its KV as it was when it began; its blocks are anybody's now."""
        site, kv = self.owners.popleft()
        assert self.decode.content(site.blocks, 0, len(site.request.tokens)) == kv
        self.decode.pool.release(site.blocks)

    async def go_on(self, workers: list[Prefill]) -> None:
        """A moment of everybody else's life."""
        if self.held and self.random.random() < 0.5:
            self.let_through()
        await asyncio.sleep(0)
        for worker in workers:
            self.manage(worker)

    def let_through(self) -> None:
        """A frame that an honest worker sent arrives, not always the oldest."""
        number = min(int(self.random.expovariate(1.0)), len(self.held) - 1)
        route, parts = self.held.pop(number)
        self.receiver.take(route, parts)

    def adds_up(self) -> None:
        counters, landings = self.receiver.counters, self.decode.landings
        assert self.taken == (
            counters["frames"]
            + counters["bad_frames"]
            + counters["dropped"]
            + counters["fenced"]
            + sum(self.honest.values())
            + self.intrusions
        )
        known = [v for v in vars(self.receiver).values() if isinstance(v, OrderedDict)]
        assert known
        assert all(len(table) <= MAX_KNOWN for table in known)
        assert len(landings) <= 2
        counts = self.decode.pool.counts()
        assert counts.free + counts.promised + counts.owned + counts.cached == BLOCKS


def frame_of(key: Key) -> Frame:
    return decode(list(key))


def pages(cache: KVCache) -> list[np.ndarray]:
    """All of its bytes, as they are now and later."""
    parts = [cache.keys, cache.values]
    return [
        part(layer).view(torch.uint8).numpy() for part in parts for layer in range(LAYOUT.layers)
    ]
