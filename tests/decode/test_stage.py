from __future__ import annotations

from typing import Any

import torch

from cluster import metrics
from cluster.messages import (
    Cancel,
    Failed,
    Generate,
    Landing,
    Peer,
    Prefill,
    Promise,
    Promised,
    Request,
    Start,
    Token,
)
from cluster.orders import Drain, Ordered, SessionClosed, Tick
from decode.stage import DecodeStage
from engine import loop
from engine.allocator import Allocator
from engine.blocks import BlockPool
from engine.cache import KVCache, group_spans
from kvtransfer.frames import Address, Box, Chunk, Fields, Manifest, Sealed, combined, digest_of
from kvtransfer.landing import Landings
from kvtransfer.receiver import Arrived
from tests.hash_model import LAYOUT, WINDOWS, HashRunner, ask_for, expected

SIZE = 4


class Room:
    """A decode stage, and a prefill worker's KV for it whenever `land` is called."""

    def __init__(self, blocks: int = 20, budget: int = 16, max_sequences: int = 8) -> None:
        self.pool = BlockPool(blocks, SIZE)
        self.cache = KVCache(LAYOUT, blocks, SIZE)
        self.allocator = Allocator(self.pool, lambda salt: b"root" + salt)
        self.runner = HashRunner(self.cache)
        self.now = 0.0
        self.short = False  # of memory
        self.landings = Landings(self.pool, self.cache, Peer("d", 7), "memory", lease_s=10.0)
        self.stage = DecodeStage(
            self.cache,
            self.pool,
            self.allocator,
            WINDOWS,
            self.landings,
            budget=budget,
            max_sequences=max_sequences,
            clock=lambda: self.now,
            short=lambda: self.short,
        )
        self.steps = loop.Steps(self.stage, self.runner)
        self.replies: list[Fields] = []

    def tell(self, *orders: Any, session: int = 1) -> None:
        for order in orders:
            local = isinstance(order, SessionClosed | Drain | Tick | Arrived)
            self.stage.apply(order if local else Ordered(session, order, self.now))

    def mail(self) -> list[Any]:
        return [event for _, event in self.stage.mail()]

    def step(self) -> list[Any]:
        self.steps.step()
        self.now += 1.0
        assert not self.runner.faults, self.runner.faults
        return self.mail()

    def run(self, steps: int = 200) -> dict[str, list[Token]]:
        """Steps until nothing is left to do; all tokens, by request."""
        said: dict[str, list[Token]] = {}
        for _ in range(steps):
            for event in self.step():
                assert isinstance(event, Token), event
                said.setdefault(event.request_id, []).append(event)
        return said

    def promise(self, request: Request, attempt: int = 1) -> Landing:
        self.tell(Promise(request, attempt))
        (promised,) = self.mail()
        assert isinstance(promised, Promised)
        return promised.landing

    def land(self, request: Request, landing: Landing, attempt: int = 1) -> None:
        """Its KV arrives whole, and is sealed."""
        tokens = range(landing.cached_tokens, len(request.tokens))
        address = Address(landing.id, landing.generation, landing.peer.incarnation, attempt)
        digests: list[tuple[int, int]] = []
        if tokens:
            for index, span in enumerate(group_spans(LAYOUT)):
                body = _kv(request, span, tokens)
                digests.append((index, digest_of(body)))
                heads = range(LAYOUT.groups[index].kv_heads)
                chunk = Chunk(address, index, Box(span, heads, tokens), "float32")
                self._arrive(chunk, body, digests[-1][1])
        self._arrive(Manifest(address, len(digests), tokens, combined(digests)), b"", 0)

    def _arrive(self, fields: Any, body: bytes, digest: int) -> None:
        self.tell(Arrived(fields, body, digest, lambda reply, text: self.replies.append(reply)))

    def start(self, request: Request, attempt: int = 1) -> None:
        self.tell(Start(request.id, expected(request)[0], attempt))

    def admit(self, request: Request) -> None:
        """The good case up to the running batch."""
        self.land(request, self.promise(request))
        self.start(request)

    @property
    def idle(self) -> bool:
        counts = self.pool.counts()
        return counts.owned == counts.promised == 0


def _kv(request: Request, layers: range, tokens: range) -> bytes:
    """What HashRunner writes on a prefill worker, in its form for the wire."""
    group = next(g for g, s in zip(LAYOUT.groups, group_spans(LAYOUT), strict=True) if s == layers)
    ids = torch.tensor(request.tokens)[tokens.start : tokens.stop].float()
    ones = torch.ones(len(tokens))
    positions = torch.arange(tokens.start, tokens.stop).float()
    parts = []
    for layer in layers:
        kv = torch.stack([ids, positions, ones * layer, ones], dim=1)
        kv = kv[:, None].expand(-1, group.kv_heads, -1)
        parts.append(torch.stack([kv, -kv]))
    return torch.stack(parts).contiguous().numpy().tobytes()


def tokens_of(request: Request) -> list[int]:
    """What the decode worker is to say: all but the first."""
    return expected(request)[1:]


def test_promise_land_start_and_go_on() -> None:
    room, request = Room(), ask_for("a", 10, max_tokens=4)
    landing = room.promise(request)
    assert (landing.peer, landing.address, landing.cached_tokens) == (Peer("d", 7), "memory", 0)
    assert room.pool.counts().promised == 3
    room.land(request, landing)
    assert isinstance(room.replies[-1], Sealed)
    room.start(request)
    said = room.run(5)["a"]
    assert [token.token for token in said] == tokens_of(request)
    assert [token.index for token in said] == [1, 2, 3]
    assert [token.finish for token in said] == ["", "", "length"]
    assert set(dict(said[0].spans)) == {"transfer_tail", "decode_admit", "first_step"}
    assert said[1].spans == ()
    assert room.idle


def test_a_start_may_come_before_the_seal() -> None:
    room, request = Room(), ask_for("a", 10)
    landing = room.promise(request)
    room.start(request)
    room.now = 2.0
    assert room.step() == []
    room.land(request, landing)
    said = room.run(9)["a"]
    assert [token.token for token in said] == tokens_of(request)
    assert dict(said[0].spans)["transfer_tail"] == 3.0


def test_a_start_that_came_within_a_step_has_waited_since_then() -> None:
    """From the later of the two on: no transfer is to blame for it."""
    room, request = Room(), ask_for("a", 10)
    landing = room.promise(request)
    room.land(request, landing)
    sealed_at, room.now = room.now, room.now + 5.0
    room.stage.apply(Ordered(1, Start("a", expected(request)[0], 1), sealed_at + 2.0))
    said = room.run(9)["a"]
    assert dict(said[0].spans)["transfer_tail"] == 0.0
    assert dict(said[0].spans)["decode_admit"] == 3.0


def test_a_prompt_found_whole_is_sealed_by_its_manifest_alone() -> None:
    room, request = Room(), ask_for("a", 8, max_tokens=3)
    room.admit(request)
    room.run(5)
    again = Request("b", request.tokens, request.sampling)
    landing = room.promise(again)
    assert (landing.cached_tokens, room.pool.counts().promised) == (8, 0)
    room.land(again, landing)
    room.start(again)
    assert [token.token for token in room.run(5)["b"]] == tokens_of(request)
    assert room.idle


def test_what_does_not_fit_is_said() -> None:
    room = Room(blocks=4, max_sequences=2)
    big = ask_for("big", 10, max_tokens=8)
    first = ask_for("first", 5, max_tokens=2)
    room.tell(Promise(big))
    assert room.mail() == [Failed("big", 1, "too_large")]
    room.tell(Promise(first), Promise(ask_for("blocks", 12, max_tokens=2)))
    assert room.mail()[1:] == [Failed("blocks", 1, "full")]
    room.tell(Promise(ask_for("second", 1, 2)), Promise(ask_for("seats", 1, 2)))
    assert room.mail()[1:] == [Failed("seats", 1, "full")]
    room.tell(Drain(), Promise(ask_for("late", 1, 2)), Generate(ask_for("later", 1, 2)))
    assert room.mail() == [Failed("late", 1, "draining"), Failed("later", 1, "draining")]
    room.tell(Prefill(first, None))
    assert room.mail() == [Failed("first", 1, "wrong_role")]


def test_draining_lets_the_promised_come() -> None:
    room, request = Room(), ask_for("a", 10)
    landing = room.promise(request)
    room.tell(Drain())
    room.land(request, landing)
    room.start(request)
    assert [token.token for token in room.run(9)["a"]] == tokens_of(request)


def test_a_landing_whose_lease_is_over_is_freed_and_said() -> None:
    room = Room()
    waiting, sealed, started = (ask_for(name, 10) for name in ("waiting", "sealed", "started"))
    room.promise(waiting)
    room.land(sealed, room.promise(sealed))
    room.promise(started)
    room.start(started)
    room.now = 9.9
    room.tell(Tick())
    assert room.mail() == []
    room.now = 10.0
    room.tell(Tick())
    assert sorted(event.request_id for event in room.mail()) == ["sealed", "started", "waiting"]
    assert room.idle
    room.start(sealed)
    assert room.mail() == [Failed("sealed", 1, "lease_expired")]


def test_a_running_sequence_has_no_lease() -> None:
    room, request = Room(), ask_for("a", 10)
    room.admit(request)
    room.now = 1000.0
    room.tell(Tick())
    assert [token.token for token in room.run(9)["a"]] == tokens_of(request)


def test_a_cancel_frees_in_every_state() -> None:
    for state in ("promised", "sealed", "start waits", "running", "waiting", "prefilling"):
        room, request = Room(budget=4), ask_for("a", 10)
        if state in ("waiting", "prefilling"):
            room.tell(Generate(request))
        else:
            landing = room.promise(request)
        if state in ("sealed", "running"):
            room.land(request, landing)
        if state in ("start waits", "running"):
            room.start(request)
        if state in ("running", "prefilling"):
            room.step()
        room.tell(Cancel("a", 0))
        assert room.idle == (state == "waiting"), state
        room.tell(Cancel("a"), Cancel("a", 2))
        assert room.idle and len(room.landings) == 0, state
        assert room.step() == []


def test_a_gateway_that_goes_takes_its_requests_with_it() -> None:
    room = Room(blocks=40)
    room.promise(ask_for("promised", 10))
    room.admit(ask_for("running", 10))
    room.tell(Generate(ask_for("waiting", 10)))
    other = ask_for("other", 10)
    room.tell(Generate(other), session=2)
    room.tell(SessionClosed(1))
    assert [token.token for token in room.run(10)["other"]] == expected(other)
    assert room.idle


def test_said_twice_or_late_it_is_nothing() -> None:
    room, request = Room(), ask_for("a", 10)
    landing = room.promise(request)
    assert room.promise(request) == landing
    room.land(request, landing)
    room.start(request)
    room.start(request)
    room.tell(Promise(request), Promise(request, 0), Generate(request))
    room.tell(Start("a", 5, 0))
    said = room.run(9)
    assert [token.token for token in said["a"]] == tokens_of(request)
    assert room.idle


def test_a_start_for_another_attempt_starts_nothing() -> None:
    room, request = Room(), ask_for("a", 10)
    room.promise(request, attempt=1)
    room.start(request, attempt=1)
    landing = room.promise(request, attempt=2)
    assert landing.generation == 2
    room.land(request, landing, attempt=2)
    assert room.mail() == []
    room.start(request, attempt=2)
    said = room.run(9)["a"]
    assert {token.attempt for token in said} == {2}
    assert [token.token for token in said] == tokens_of(request)


def test_undivided_it_mixes_prompts_and_answers_within_its_budget() -> None:
    room = Room(blocks=60, budget=8)
    requests = [ask_for(f"{number}", 6 + 5 * number) for number in range(4)]
    for request in requests:
        room.tell(Generate(request))
    said = room.run(30)
    for request in requests:
        assert [token.token for token in said[request.id]] == expected(request)
        assert [token.index for token in said[request.id]] == list(range(8))
    assert max(map(sum, room.runner.steps)) == 8
    assert any(1 in step and step[-1] > 1 for step in room.runner.steps)
    first = dict(said["0"][0].spans)
    assert set(first) == {"prefill_queue", "prefill"}
    assert room.idle


def test_the_youngest_is_evicted_and_goes_on_where_it_was() -> None:
    room = Room(blocks=8)
    old, young = ask_for("old", 8, max_tokens=16), ask_for("young", 8, max_tokens=16)
    room.admit(old)
    room.now = 1.0
    room.admit(young)
    said: dict[str, list[Token]] = {"old": [], "young": []}
    for _ in range(60):
        for token in room.step():
            said[token.request_id].append(token)
    for request in (old, young):
        assert [token.token for token in said[request.id]] == tokens_of(request)
        assert [token.index for token in said[request.id]] == list(range(1, 16))
    assert dict(room.stage.load(1).counters)[metrics.PREEMPTIONS] >= 1
    assert room.idle


def test_launched_ahead_a_prompt_that_ends_makes_room_for_its_next_token() -> None:
    """The pool is full when the step behind the prompt's last one is planned."""
    room = Room(blocks=5)
    room.runner.ahead = True
    old, young = ask_for("old", 8, max_tokens=8), ask_for("young", 8, max_tokens=4)
    room.admit(old)
    room.now = 1.0
    room.tell(Generate(young))
    said = room.run(30)
    assert [token.token for token in said["old"]] == tokens_of(old)
    assert [token.token for token in said["young"]] == expected(young)
    assert dict(room.stage.load(1).counters)[metrics.PREEMPTIONS] == 1
    assert room.idle


def test_launched_ahead_nothing_is_computed_behind_the_only_token() -> None:
    room = Room()
    room.runner.ahead = True
    room.tell(Generate(ask_for("one", 8, max_tokens=1)))
    assert len(room.run(3)["one"]) == 1
    assert room.runner.steps == [(8,)]


def test_short_of_memory_it_lets_nobody_in_beside_those_who_run() -> None:
    room = Room()
    room.short = True
    room.admit(ask_for("first", 4, max_tokens=3))  # else nothing would ever be given back
    room.tell(Promise(ask_for("second", 4, max_tokens=3)))
    assert room.mail() == [Failed("second", 1, "full")]
    assert set(room.run(5)) == {"first"}
    room.promise(ask_for("second", 4, max_tokens=3))


def test_the_evicted_come_before_newcomers() -> None:
    room = Room(blocks=8)
    room.admit(ask_for("old", 8, max_tokens=16))
    room.now = 1.0
    room.admit(ask_for("young", 8, max_tokens=16))
    while not room.stage.load(1).waiting:
        room.step()
    assert room.pool.available >= 2
    room.tell(Promise(ask_for("late", 1, max_tokens=2)))
    assert room.mail() == [Failed("late", 1, "full")]
    assert set(room.run(60)) == {"old", "young"}
    room.promise(ask_for("late", 1, max_tokens=2))


def test_the_evicted_may_be_cancelled() -> None:
    room = Room(blocks=8)
    room.admit(ask_for("old", 8, max_tokens=16))
    room.now = 1.0
    room.admit(ask_for("young", 8, max_tokens=16))
    while not room.stage.load(1).waiting:
        room.step()
    room.tell(Cancel("young"))
    assert room.stage.load(1).waiting == 0
    assert len(room.run(60)["old"]) > 0
    assert room.idle


def test_those_that_end_in_one_step_all_end() -> None:
    room = Room(blocks=40)
    requests = [ask_for(f"{number}", 5 + number, max_tokens=3) for number in range(4)]
    for request in requests:
        room.admit(request)
    room.step()
    assert [event.finish for event in room.step()] == ["length"] * 4
    assert room.idle and room.step() == []


def test_a_step_that_raises_fails_its_sequences_alone() -> None:
    room = Room(blocks=40)
    room.admit(ask_for("running", 10))
    promised = ask_for("promised", 10)
    landing = room.promise(promised)
    room.runner.explode = True
    assert room.step() == [Failed("running", 1, "engine_error")]
    room.runner.explode = False
    room.land(promised, landing)
    room.start(promised)
    assert [token.token for token in room.run(9)["promised"]] == tokens_of(promised)
    assert room.idle


def test_load_tells_what_is_there() -> None:
    room = Room(budget=4)
    room.promise(ask_for("promised", 10))
    room.admit(ask_for("running", 10))
    room.tell(Generate(ask_for("prefilling", 10)))
    room.step()
    load = room.stage.load(5)
    assert (load.progress, load.running, load.waiting, load.queued_tokens) == (5, 2, 0, 7)
    assert (load.promised_blocks, load.owned_blocks) == (3, 6)
    assert load.free_blocks + load.cached_blocks == 11
