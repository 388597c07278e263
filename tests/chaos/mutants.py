"""Mutants: the real code with one line of its protocol taken out.

A checker that has never seen a violation proves nothing. Each of these must be found by the seeds
that its test runs; without the patch the same seeds hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.messages import Cancel, Failed, Token
from engine.allocator import Allocator
from engine.blocks import BlockPool
from gateway import pools, recovery, relay, session
from kvtransfer import receiver
from kvtransfer.frames import _PREFIX, Buffer, Frame, decode
from kvtransfer.landing import Landings, Site
from kvtransfer.sender import Sender
from prefill.stage import PrefillStage

Patch = pytest.MonkeyPatch


def a_damaged_body_is_taken_for_whole(patch: Patch) -> None:
    """The receiver believes the digest in the header."""

    def trusting(parts: list[Buffer], digest: Any = None) -> Frame:
        declared = _PREFIX.unpack_from(bytes(parts[0]))[5] if len(parts) == 2 else 0
        return decode(parts, lambda body: declared)

    patch.setattr(receiver, "decode", trusting)


def a_landing_is_started_before_it_is_sealed(patch: Patch) -> None:
    honest = Landings.start

    def start(self: Landings, request_id: str, attempt: int) -> Site | None:
        site = self._sites.get(request_id)
        if site is not None and site.attempt == attempt and site.state.value == "promised":
            self._seal(site, site.expires)
        return honest(self, request_id, attempt)

    patch.setattr(Landings, "start", start)


def blocks_are_freed_while_they_are_sent(patch: Patch) -> None:
    honest = PrefillStage._finish

    def finish(self: PrefillStage, sequence: Any, sampled: Any) -> None:
        honest(self, sequence, sampled)
        self._allocator.free(sequence)

    patch.setattr(PrefillStage, "_finish", finish)


def late_chunks_are_written_into_freed_blocks(patch: Patch) -> None:
    """A landing that is gone is still found, and its blocks' generations are not looked at."""
    honest = Landings._leave
    gone: dict[str, Site] = {}

    def leave(self: Landings, site: Site, state: Any) -> None:
        honest(self, site, state)
        gone[site.landing.id] = site

    def write(self: Landings, chunk: Any, body: Buffer, digest: int, now: float) -> None:
        site = gone.get(chunk.address.landing)
        if site is not None and site.slots is not None and self._by_id is not None:
            slots = site.slots[chunk.box.tokens.start : chunk.box.tokens.stop]
            self._cache.scatter(chunk.box.layers, slots, body, chunk.box.heads)
            return
        honest_write(self, chunk, body, digest, now)

    honest_write = Landings.write
    patch.setattr(Landings, "_leave", leave)
    patch.setattr(Landings, "write", write)


def a_token_said_twice_is_taken_twice(patch: Patch) -> None:
    async def next_token(self: relay.Relay) -> Any:
        while True:
            event = await self.next_event()
            if isinstance(event, Failed):
                relay.fail(event)
            if isinstance(event, Token):
                self.emitted.append(event.token)
                return event

    patch.setattr(relay.Relay, "next_token", next_token)


def a_resumed_request_forgets_a_token(patch: Patch) -> None:
    honest = relay.Relay.lose

    def lose(self: relay.Relay, error: Any, now: float) -> str:
        cause = honest(self, error, now)
        if self.request.emitted > 1:
            tokens = (*self.request.tokens[:-2], self.request.tokens[-1])
            self.request = replace(self.request, tokens=tokens, emitted=self.request.emitted - 1)
        return cause

    patch.setattr(relay.Relay, "lose", lose)


def a_resumed_request_counts_from_one_too_many(patch: Patch) -> None:
    honest = relay.Relay.lose

    def lose(self: relay.Relay, error: Any, now: float) -> str:
        cause = honest(self, error, now)
        if self.request.emitted:
            self.request = replace(self.request, emitted=self.request.emitted - 1)
        return cause

    patch.setattr(relay.Relay, "lose", lose)


def leases_are_never_swept(patch: Patch) -> None:
    patch.setattr(Landings, "sweep", lambda self, now: [])


def cancels_get_lost(patch: Patch) -> None:
    honest = session.WorkerSession.send

    def send(self: session.WorkerSession, order: Any) -> None:
        if not isinstance(order, Cancel):
            honest(self, order)

    patch.setattr(session.WorkerSession, "send", send)


def attempts_are_without_end(patch: Patch) -> None:
    patch.setattr(recovery, "MAX_ATTEMPTS", 1000)


def a_request_may_kill_any_number_of_workers(patch: Patch) -> None:
    patch.setattr(recovery, "MAX_DEATHS", 1000)


def nothing_is_tried_again(patch: Patch) -> None:
    patch.setattr(recovery, "MAX_ATTEMPTS", 1)


def a_hung_step_loop_goes_unnoticed(patch: Patch) -> None:
    patch.setattr(pools, "STILL_BEATS", 1000)


def a_stall_is_taken_for_death(patch: Patch) -> None:
    patch.setattr(pools, "MISSED_BEATS", 1)


def tenants_share_their_prefixes(patch: Patch) -> None:
    honest = Allocator.__init__

    def init(self: Allocator, pool: BlockPool, root: Any, caching: bool = True) -> None:
        honest(self, pool, lambda salt: root(b""), caching)

    patch.setattr(Allocator, "__init__", init)


def a_block_is_published_before_it_is_full(patch: Patch) -> None:
    def publish(self: Allocator, sequence: Any) -> None:
        full = sequence.known // self._pool.block_size
        if full > len(sequence.blocks) or not self._caching:
            return
        keys = self._keys(sequence, full)
        for number in range(sequence.published, full):
            self._pool.publish(sequence.blocks[number], keys[number])
        sequence.published = max(full, sequence.published)

    patch.setattr(Allocator, "publish", publish)


def ended_requests_keep_their_mailboxes(patch: Patch) -> None:
    patch.setattr(session.WorkerSession, "forget", lambda self, request_id: None)


def handoffs_never_end(patch: Patch) -> None:
    """A link that is lost tells nobody: the hold on the blocks stays."""

    def release(self: Sender, run: Any, error: Any) -> None:
        if error is None:
            honest(self, run, error)

    honest = Sender._release
    patch.setattr(Sender, "_release", release)


def a_zombie_evicts_its_successor(patch: Patch) -> None:
    """Who comes last has the name."""
    honest = pools.Pools._check

    def check(self: pools.Pools, hello: Any) -> None:
        honest(self, replace(hello, peer=replace(hello.peer, incarnation=2**64)))

    patch.setattr(pools.Pools, "_check", check)
