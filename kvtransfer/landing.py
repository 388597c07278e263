"""Landings: what a decode worker promised, and the only place where KV off the network is written.

    promise --> PROMISED --chunks, manifest--> SEALED --start--> STARTED: a sequence owns the blocks
                    |                            |
                    `-------- cancel, sweep -----'-------------> RELEASED: blocks free again

Nothing is trusted that a frame says about itself: landing, generation, attempt, incarnation, lease,
ranges and the blocks' own generations are compared at the moment of writing, by the thread that
could give the blocks away. A landing is sealed when its boxes, which never overlap, fill it exactly
and the manifest's count and digest are those of what was written.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from cluster import metrics
from cluster.errors import TransferFailed
from cluster.ids import new_id
from cluster.lifecycle import LandingState, advance_landing
from cluster.messages import Landing, Peer, Request
from engine.blocks import Block, BlockPool
from engine.cache import KVCache
from engine.staging import Slots
from kvtransfer.cells import Cells
from kvtransfer.frames import (
    Ack,
    Address,
    Box,
    Buffer,
    Chunk,
    Fields,
    Manifest,
    Reject,
    Renew,
    Sealed,
    combined,
)
from kvtransfer.receiver import Arrived

MOST_STARTED = 64

_EVENTS = ("promised", "rearmed", "sealed", "started", "replaced", "cancelled")
"""What may happen to a landing, besides that it expires."""


@dataclass(eq=False, slots=True)
class Site:
    """One landing as its worker sees it: the blocks, and what has been written to them.

    `blocks` hold the request's tokens in order: first those found in the prefix cache, which
    nothing writes to, then the promised ones.
    """

    landing: Landing
    request: Request
    attempt: int
    keys: Sequence[bytes]  # of the full blocks
    blocks: list[Block]
    found: int  # how many blocks the prefix cache had
    expires: float
    cells: Cells
    slots: Slots  # of all of the tokens
    state: LandingState = LandingState.PROMISED
    written: dict[int, tuple[Box, int]] = field(default_factory=dict)  # chunk -> box, digest
    manifest: Manifest | None = None
    sealed_at: float = 0.0

    @property
    def key(self) -> tuple[str, int]:
        return self.request.id, self.attempt

    @property
    def tokens(self) -> range:
        """The tokens that the prefill worker is to send."""
        return range(self.landing.cached_tokens, len(self.request.tokens))

    @property
    def address(self) -> Address:
        """What a frame must say to be written."""
        landing = self.landing
        return Address(landing.id, landing.generation, landing.peer.incarnation, self.attempt)


class Rejected(Exception):
    """A frame that must not be obeyed. The message is one of a few, and goes to its sender."""


class Landings:
    """All landings of one decode worker. Owned by the step thread; `now` is the worker's clock."""

    def __init__(
        self, pool: BlockPool, cache: KVCache, peer: Peer, address: str, lease_s: float = 10.0
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()  # frames, by reason
        self._pool = pool
        self._cache = cache
        self._peer = peer
        self._address = address
        self._lease_s = lease_s
        self._sites: dict[str, Site] = {}  # by request id
        self._by_id: dict[str, Site] = {}  # by landing id
        # Of landings that were started: a sender whose last chunk came late asks once more.
        self._started: deque[Manifest] = deque(maxlen=MOST_STARTED)

    def __len__(self) -> int:
        return len(self._sites)

    def promise(
        self, request: Request, attempt: int, now: float, keys: Sequence[bytes] = ()
    ) -> Landing:
        """Blocks for the request's tokens: those that `keys` find, promised ones for the rest.

        Asked again with the same attempt: the same landing. With a higher one: the same blocks are
        armed anew, under a new generation, so that the attempt before can write no more.
        Raises BlocksExhausted, and TransferFailed for an attempt older than the current one.
        """
        site = self._sites.get(request.id)
        if site is not None:
            if attempt < site.attempt:
                raise TransferFailed(f"attempt {attempt} is over, {site.attempt} is current")
            if attempt == site.attempt:
                return site.landing
            if site.state is LandingState.PROMISED and site.request.tokens == request.tokens:
                return self._rearm(site, attempt, now)
            self._release(site, "replaced")
        keys = keys[: len(request.tokens) // self._pool.block_size]
        blocks = self._pool.match(keys)
        found = len(blocks)
        try:
            needed = -(-len(request.tokens) // self._pool.block_size)
            blocks += self._pool.promise(needed - found)
        except BaseException:
            self._pool.release(blocks)
            raise
        cached = found * self._pool.block_size
        landing = Landing(new_id(), 1, self._peer, self._address, cached, self._lease_s)
        cells = Cells(self._cache.layout, range(cached, len(request.tokens)))
        slots = self._cache.slots_of(blocks, 0, len(request.tokens))
        expires = now + self._lease_s
        site = Site(landing, request, attempt, keys, blocks, found, expires, cells, slots)
        self._sites[request.id] = self._by_id[landing.id] = site
        self.counters["promised"] += 1
        return landing

    def receive(self, arrived: Arrived, now: float) -> tuple[str, int] | None:
        """Judge what the network brought and answer it.

        Returns (request id, attempt) if that sealed the landing.
        """
        site = self._by_id.get(arrived.fields.address.landing)
        unsealed = site is not None and site.state is LandingState.PROMISED
        verdict: Fields = Ack()
        text = ""
        try:
            match arrived.fields:
                case Chunk() as chunk:
                    self.write(chunk, arrived.body, arrived.digest, now)
                case Manifest() as manifest:
                    verdict = Sealed() if self.conclude(manifest, now) else Ack()
                case Renew(address):
                    self.renew(address, now)
        except Rejected as rejected:
            verdict, text = Reject(), str(rejected)
            self.rejected[text] += 1
        arrived.reply(verdict, text)
        if unsealed and site is not None and site.state is LandingState.SEALED:
            return site.key
        return None

    def write(self, chunk: Chunk, body: Buffer, digest: int, now: float) -> None:
        """Put one chunk into its blocks, once: a repeated one changes nothing. Raises Rejected."""
        site = self._find(chunk.address, now)
        known = site.written.get(chunk.index)
        if known is not None:
            _require(known == (chunk.box, digest), "chunk index used twice")
            self.counters["duplicate_chunks"] += 1
            return
        box, size = chunk.box, self._pool.block_size
        _require(site.state is LandingState.PROMISED, "landing is sealed")
        _require(site.cells.inside(box), "outside the landing")
        _require(chunk.dtype == self._cache.layout.dtype, "wrong dtype")
        expected = self._cache.token_bytes(box.layers, box.heads) * len(box.tokens)
        _require(len(body) == expected, "wrong size")
        _require(site.cells.free(box), "overlap")
        targets = site.blocks[box.tokens.start // size : -(-box.tokens.stop // size)]
        _require(self._pool.writable(targets), "block is no longer promised")
        slots = site.slots[box.tokens.start : box.tokens.stop]
        self._cache.scatter(box.layers, slots, body, box.heads)
        site.written[chunk.index] = box, digest
        site.cells.fill(box)
        site.expires = now + self._lease_s
        self.counters["chunks"] += 1
        self.counters["bytes"] += len(body)
        if site.manifest is not None and self._matches(site, site.manifest):
            self._seal(site, now)

    def conclude(self, manifest: Manifest, now: float) -> bool:
        """Seal the landing if it is whole; otherwise the last chunk will. Raises Rejected.

        Returns whether it is sealed, now or already.
        """
        if manifest in self._started:
            return True
        site = self._find(manifest.address, now)
        if site.state is LandingState.SEALED:
            _require(manifest == site.manifest, "another manifest sealed it")
            return True
        _require(manifest.tokens == site.tokens, "manifest does not match")
        site.manifest = manifest
        if not site.cells.full:
            return False
        _require(self._matches(site, manifest), "manifest does not match")
        self._seal(site, now)
        return True

    def renew(self, address: Address, now: float) -> None:
        """The prefill worker is still at it. Raises Rejected. A sealed one gets no more time."""
        site = self._find(address, now)
        if site.state is LandingState.PROMISED:
            site.expires = now + self._lease_s

    def start(self, request_id: str, attempt: int) -> Site | None:
        """Hand a sealed landing's blocks over to the caller; None while it is not sealed.

        Raises TransferFailed if there is no such landing (any more).
        """
        site = self._sites.get(request_id)
        if site is None or site.attempt != attempt:
            raise TransferFailed("the landing expired or was cancelled", code="lease_expired")
        if site.state is not LandingState.SEALED:
            return None
        self._leave(site, LandingState.STARTED)
        assert site.manifest is not None
        self._started.append(site.manifest)
        self.counters["started"] += 1
        return site

    def cancel(self, request_id: str, attempt: int) -> bool:
        """Free the landing of this attempt or an older one. Whether there was one to free."""
        site = self._sites.get(request_id)
        if site is None or attempt < site.attempt:
            return False
        self._release(site, "cancelled")
        return True

    def sweep(self, now: float) -> list[Site]:
        """Free every landing whose lease is over, and return them. For a timer to call."""
        expired = [site for site in self._sites.values() if site.expires <= now]
        for site in expired:
            self._release(site, "expired")
        return expired

    def give_up(self) -> list[Site]:
        """Free every landing, and return them."""
        sites = list(self._sites.values())
        for site in sites:
            self._release(site, "cancelled")
        return sites

    def metrics(self) -> Iterator[tuple[str, float]]:
        """For `Load.counters`. R1: what was stale and so not written shows here."""
        yield metrics.KV_TRANSFER_BYTES, self.counters["bytes"]
        yield metrics.KV_CHUNKS, self.counters["chunks"]
        yield metrics.KV_CHUNKS_REPEATED, self.counters["duplicate_chunks"]
        yield metrics.KV_LEASE_EXPIRED, self.counters["expired"]
        for event in _EVENTS:
            yield metrics.labelled(metrics.LANDINGS, event=event), self.counters[event]
        for reason, frames in self.rejected.items():
            yield metrics.labelled(metrics.FRAMES_REJECTED, reason=reason), frames

    def _find(self, address: Address, now: float) -> Site:
        site = self._by_id.get(address.landing)
        if site is None:
            raise Rejected("unknown landing")
        current = site.address
        _require(address.incarnation == current.incarnation, "wrong incarnation")
        _require(address.generation == current.generation, "stale generation")
        _require(address.attempt == current.attempt, "stale attempt")
        _require(now < site.expires, "lease expired")
        return site

    def _matches(self, site: Site, manifest: Manifest) -> bool:
        """Whether all is written, and is what the manifest says."""
        return (
            site.cells.full
            and manifest.chunks == len(site.written)
            and manifest.digest
            == combined((index, digest) for index, (_, digest) in site.written.items())
        )

    def _rearm(self, site: Site, attempt: int, now: float) -> Landing:
        site.landing = replace(site.landing, generation=site.landing.generation + 1)
        site.attempt = attempt
        site.written, site.manifest = {}, None
        site.cells = Cells(self._cache.layout, site.tokens)
        site.expires = now + self._lease_s
        self.counters["rearmed"] += 1
        return site.landing

    def _seal(self, site: Site, now: float) -> None:
        site.state = advance_landing(site.state, LandingState.SEALED)
        site.sealed_at = now
        site.expires = now + self._lease_s
        self._pool.adopt(site.blocks[site.found :])
        for number in range(site.found, len(site.keys)):
            self._pool.publish(site.blocks[number], site.keys[number])
        self.counters["sealed"] += 1

    def _release(self, site: Site, why: str) -> None:
        if site.state is LandingState.PROMISED:
            self._pool.revoke(site.blocks[site.found :])
            self._pool.release(site.blocks[: site.found])
        else:
            self._pool.release(site.blocks)
        self._leave(site, LandingState.RELEASED)
        self.counters[why] += 1

    def _leave(self, site: Site, state: LandingState) -> None:
        site.state = advance_landing(site.state, state)
        del self._sites[site.request.id], self._by_id[site.landing.id]


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Rejected(reason)
