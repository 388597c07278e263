"""Sender: pushes a sequence's KV to its landing while the rest is still being computed.

    step thread:   open -> announce, announce, ... -> finish            blocks held all the while
    event loop:            push, push, ...      -> manifest, sealed -> on_released: let go of them

The sender alone ends a hold, and does so exactly once for every handoff on every path, so KV is
never read from blocks that serve somebody else by now.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from cluster import metrics
from cluster.errors import BatonError, Cancelled, DeadlineExceeded, StartError, TransferFailed
from cluster.messages import Landing, Peer
from engine.cache import KVCache, group_spans
from engine.staging import NOW, Mark, Room, Slots, passed
from kvtransfer.frames import (
    MAX_BODY,
    Address,
    Box,
    Chunk,
    Manifest,
    Renew,
    combined,
    row_bytes,
)
from kvtransfer.link import Link

log = logging.getLogger(__name__)

CHUNK_BYTES = 2 << 20
"""Large enough for full speed on a loopback link, small enough that gathering it (well below a
millisecond) does not hold the event loop up."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """One sequence's KV on its way: which request, where to, and how many tokens there will be."""

    request_id: str
    attempt: int
    landing: Landing
    tokens: int

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.attempt


@dataclass(frozen=True, slots=True)
class Announcement:
    """These layers of these tokens are final in `slots` [tokens] once `ready` has passed, until the
    handoff is released."""

    layers: range
    tokens: range
    slots: Slots
    ready: Mark = NOW


@dataclass(slots=True)
class Carried:
    """What a handoff took. `tail_s` is the part that computing did not hide."""

    chunks: int = 0
    bytes: int = 0
    tail_s: float = 0.0


Released = Callable[[Handoff, BatonError | None, Carried], None]


@dataclass(eq=False, slots=True)
class _Run:
    """A handoff in progress."""

    handoff: Handoff
    counted: float  # when its receiver last answered a frame that extends the lease
    mail: asyncio.Queue[Announcement | None] = field(default_factory=asyncio.Queue)
    digests: dict[int, int] = field(default_factory=dict)  # chunk index -> body digest
    carried: Carried = field(default_factory=Carried)
    total: int | None = None  # chunks, once everything was announced
    complete: asyncio.Event = field(default_factory=asyncio.Event)  # each of them is under way
    finished: float | None = None  # when the last announcement had come
    deadline: asyncio.Timeout | None = None  # from then on
    task: asyncio.Task[None] | None = None

    @property
    def address(self) -> Address:
        landing = self.handoff.landing
        return Address(
            landing.id, landing.generation, landing.peer.incarnation, self.handoff.attempt
        )

    @property
    def manifest(self) -> Manifest:
        tokens = range(self.handoff.landing.cached_tokens, self.handoff.tokens)
        return Manifest(self.address, len(self.digests), tokens, combined(self.digests.items()))

    def answered(self) -> None:
        """A chunk was: the lease begins anew, here as there."""
        self.counted = asyncio.get_running_loop().time()
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(self.counted + self.handoff.landing.lease_s)

    def count(self) -> None:
        """To be called when `total` or `digests` has changed."""
        if len(self.digests) == self.total:
            self.complete.set()


class Sender:
    """All handoffs of one prefill worker. Belongs to the event loop; used as `async with`.

    `connect` makes a Link, not yet open, to the worker that promised the landing. `on_released` is
    called on the event loop; an error of None means sealed. Every verb about a handoff that is not
    open, or is over, does nothing (R6).

    Chunks have at most `chunk_bytes`, but no less than one token of one layer; never more than
    fits into a frame or into the link's credit. Raises StartError if not even that one token does.
    """

    def __init__(
        self,
        cache: KVCache,
        connect: Callable[[Landing], Link],
        on_released: Released,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        least = row_bytes(cache.layout)
        if least > MAX_BODY:
            raise StartError(
                f"one token of one layer takes {least} bytes of KV; a frame holds {MAX_BODY}"
            )
        self._cache = cache
        self._connect = connect
        self._on_released = on_released
        self._chunk_bytes = min(chunk_bytes, MAX_BODY)
        self._spans = group_spans(cache.layout)
        self._runs: dict[tuple[str, int], _Run] = {}
        self._links: dict[Peer, Link] = {}
        self._sealed = 0  # handoffs
        self._tail_s = 0.0  # of those sealed
        self._chunks = 0
        self._resent = 0  # by links that are no more
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Sender:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        """Cancels what is under way; every open handoff is released before this returns."""
        for run in list(self._runs.values()):
            self._stop(run)
        await self._group.__aexit__(None, None, None)
        for link in self._links.values():
            link.close()

    def __len__(self) -> int:
        return len(self._runs)

    def metrics(self) -> Iterator[tuple[str, float]]:
        """For `Load.counters`. The bytes sent are among what `on_released` tells."""
        yield metrics.HANDOFFS_SENT, self._sealed
        yield metrics.KV_TRANSFER_SECONDS, self._tail_s
        yield metrics.KV_CHUNKS, self._chunks
        yield (
            metrics.KV_CHUNKS_RESENT,
            self._resent + sum(link.resent for link in self._links.values()),
        )

    def open(self, handoff: Handoff) -> None:
        """Begin: connects at once, so that the handshake hides behind the computing."""
        assert handoff.key not in self._runs, f"{handoff.key} is open already"
        run = _Run(handoff, asyncio.get_running_loop().time())
        self._runs[handoff.key] = run
        run.task = self._group.create_task(self._carry(run))
        # A task cancelled before its first step runs no code at all, so not even a `finally`.
        run.task.add_done_callback(lambda _: self._release(run, Cancelled("cancelled")))

    def announce(self, request_id: str, attempt: int, announcement: Announcement) -> None:
        """More is final. What the landing has already (its cached tokens) is left out here."""
        if run := self._runs.get((request_id, attempt)):
            run.mail.put_nowait(announcement)

    def finish(self, request_id: str, attempt: int) -> None:
        """Everything was announced. From here the lease is the deadline from answer to answer."""
        if run := self._runs.get((request_id, attempt)):
            run.finished = asyncio.get_running_loop().time()
            run.mail.put_nowait(None)

    def cancel(self, request_id: str, attempt: int) -> None:
        """Stop, in any phase; `on_released` follows at once with Cancelled."""
        if run := self._runs.get((request_id, attempt)):
            self._stop(run)

    def _stop(self, run: _Run) -> None:
        assert run.task is not None
        run.task.cancel()

    async def _carry(self, run: _Run) -> None:
        error: BatonError | None = None
        try:
            await self._push_all(run)
        except* BatonError as group:
            error = _first(group)
        except* TimeoutError:
            error = DeadlineExceeded("the handoff outlived its lease")
        except* Exception:
            log.exception("handoff failed", extra={"request": run.handoff.request_id})
            error = TransferFailed("the handoff failed on the prefill worker")
        if run.finished is not None:
            run.carried.tail_s = asyncio.get_running_loop().time() - run.finished
        self._release(run, error)

    def _release(self, run: _Run, error: BatonError | None) -> None:
        if self._runs.pop(run.handoff.key, None) is run:
            self._chunks += run.carried.chunks
            if error is None:
                self._sealed += 1
                self._tail_s += run.carried.tail_s
            self._on_released(run.handoff, error, run.carried)

    async def _push_all(self, run: _Run) -> None:
        landing = run.handoff.landing
        async with asyncio.timeout(None) as deadline:
            link = self._link(landing)
            await link.open()
            async with asyncio.TaskGroup() as group:
                lease = group.create_task(self._keep_lease(run, link))
                async with asyncio.TaskGroup() as pushes:
                    sealing = pushes.create_task(self._seal(run, link))
                    index = 0
                    while (announcement := await run.mail.get()) is not None:
                        await passed(announcement.ready)
                        for box, slots in self._pieces(announcement, landing.cached_tokens, link):
                            pushes.create_task(self._push(run, link, index, box, slots))
                            index += 1
                    assert run.finished is not None
                    deadline.reschedule(run.finished + landing.lease_s)
                    run.deadline = deadline
                    run.total = index
                    run.count()
                lease.cancel()
            if not sealing.result() and not await link.seal(run.manifest):
                raise TransferFailed(f"{landing.peer.name}: chunks are missing")

    async def _seal(self, run: _Run, link: Link) -> bool:
        """Send the manifest behind the last chunk and not behind its answer.

        A receiver answers between two of its steps, so waiting would cost the sequence one of them.
        Whether it sealed the landing: a chunk that arrived damaged comes later than the manifest.
        """
        await run.complete.wait()
        return await link.seal(run.manifest)

    async def _keep_lease(self, run: _Run, link: Link) -> None:
        """Renew the landing's lease whenever no chunk has for a third of it."""
        loop = asyncio.get_running_loop()
        while True:
            due = run.counted + run.handoff.landing.lease_s / 3
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            else:
                await link.renew(Renew(run.address))
                run.counted = loop.time()

    async def _push(self, run: _Run, link: Link, index: int, box: Box, slots: Slots) -> None:
        chunk = Chunk(run.address, index, box, self._cache.layout.dtype)
        size = self._cache.token_bytes(box.layers) * len(slots)

        def fill(room: Room) -> Awaitable[None] | None:
            return self._cache.fill(box.layers, slots, room)

        def sent(digest: int) -> None:
            run.digests[index] = digest
            run.count()

        await link.send(chunk, size, fill, sent)
        run.answered()
        run.carried.chunks += 1
        run.carried.bytes += size

    def _pieces(
        self, announcement: Announcement, cached: int, link: Link
    ) -> Iterator[tuple[Box, Slots]]:
        """The announced box without what the landing has, cut to chunks within one layer group."""
        limit = min(self._chunk_bytes, link.credit)
        start, stop = max(announcement.tokens.start, cached), announcement.tokens.stop
        for span, group in zip(self._spans, self._cache.layout.groups, strict=True):
            first = max(span.start, announcement.layers.start)
            last = min(span.stop, announcement.layers.stop)
            if first >= last or start >= stop:
                continue
            row = self._cache.token_bytes(range(first, first + 1))
            tokens = max(1, min(stop - start, limit // row))
            layers = max(1, limit // (row * tokens))
            for layer in range(first, last, layers):
                for token in range(start, stop, tokens):
                    box = Box(
                        range(layer, min(layer + layers, last)),
                        range(group.kv_heads),
                        range(token, min(token + tokens, stop)),
                    )
                    begin = token - announcement.tokens.start
                    yield box, announcement.slots[begin : begin + len(box.tokens)]

    def _link(self, landing: Landing) -> Link:
        """The link to the landing's worker; those to its earlier starts are closed."""
        for peer, link in list(self._links.items()):
            if link.lost or (peer.name == landing.peer.name and peer != landing.peer):
                link.close()
                self._resent += link.resent
                del self._links[peer]
        if landing.peer not in self._links:
            self._links[landing.peer] = self._connect(landing)
        return self._links[landing.peer]


def _first(group: BaseExceptionGroup[BatonError]) -> BatonError:
    """Of failures that came together the first one: the others follow from it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, BatonError)
    return error
