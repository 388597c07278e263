from __future__ import annotations

from typing import Any

from cluster import metrics
from cluster.errors import Cancelled, TransferFailed
from cluster.messages import Cancel, Failed, Landing, Peer, Prefill, Request, Sampling, Start, Token
from cluster.orders import Drain, Ordered, SessionClosed, Tick
from engine import loop
from engine.allocator import Allocator
from engine.blocks import BlockPool
from engine.cache import KVCache
from kvtransfer.sender import Announcement, Handoff
from prefill.stage import HandoffEnded, PrefillStage
from tests.engine.fake_device import FakeMark
from tests.hash_model import LAYOUT, WINDOWS, HashRunner, ask_for, expected

LANDING = Landing("0" * 32, 1, Peer("d", 1), "memory", 0, 10.0)


class Pushes:
    """Writes down what the stage tells the sender."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def open(self, handoff: Handoff) -> None:
        self.said.append(("open", handoff.request_id, handoff.tokens))

    def announce(self, request_id: str, attempt: int, announcement: Announcement) -> None:
        assert len(announcement.slots) == len(announcement.tokens)
        self.said.append(("announce", request_id, announcement.layers, announcement.tokens))

    def finish(self, request_id: str, attempt: int) -> None:
        self.said.append(("finish", request_id))

    def cancel(self, request_id: str, attempt: int) -> None:
        self.said.append(("cancel", request_id))

    def take(self) -> list[tuple[Any, ...]]:
        said, self.said = self.said, []
        return said


class Room:
    def __init__(self, blocks: int = 20, budget: int = 8, chunk_bytes: int = 1 << 20) -> None:
        self.pool = BlockPool(blocks, block_size=4)
        self.cache = KVCache(LAYOUT, blocks, block_size=4)
        self.pushes = Pushes()
        self.runner = HashRunner(self.cache)
        self.now = 0.0
        self.stage = PrefillStage(
            self.cache,
            self.pool,
            Allocator(self.pool, lambda salt: b"root" + salt),
            WINDOWS,
            self.pushes,
            budget=budget,
            chunk_bytes=chunk_bytes,
            clock=lambda: self.now,
        )
        self.steps = loop.Steps(self.stage, self.runner)

    def tell(self, *orders: Any, session: int = 1) -> None:
        for order in orders:
            local = isinstance(order, HandoffEnded | SessionClosed | Drain | Tick)
            self.stage.apply(order if local else Ordered(session, order, self.now))

    def step(self) -> list[Any]:
        """One step, and what it had to say."""
        self.steps.step()
        self.now += 1.0
        assert not self.runner.faults
        return [event for _, event in self.stage.mail()]

    @property
    def held(self) -> int:
        return self.pool.counts().owned


def ended(request: Request, error: Any = None) -> HandoffEnded:
    return HandoffEnded(request.id, 1, error, 100)


def test_an_order_that_came_within_a_step_has_waited_since_then() -> None:
    room, request = Room(), ask_for("a", 3)
    room.stage.apply(Ordered(1, Prefill(request, None), room.now - 4.0))
    (token,) = room.step()
    assert dict(token.spans)["prefill_queue"] == 4.0


def test_a_prompt_is_pushed_while_it_is_read_and_held_until_the_handoff_ends() -> None:
    room, request = Room(), ask_for("a", 13)
    room.tell(Prefill(request, LANDING))
    assert room.step() == []
    assert room.pushes.take() == [
        ("open", "a", 13),
        ("announce", "a", range(2), range(8)),
        ("announce", "a", range(2, 3), range(8)),
    ]
    (token,) = room.step()
    assert (token.index, token.token, token.finish) == (0, expected(request)[0], "")
    assert dict(token.spans) == {"prefill_queue": 0.0, "prefill": 1.0}
    assert room.pushes.take()[-1] == ("finish", "a")
    assert (room.held, room.stage.load(1).running) == (4, 1)
    room.tell(ended(request))
    assert room.step() == []
    assert (room.held, room.stage.load(1).running, room.pool.counts().cached) == (0, 0, 3)


def test_layers_are_announced_in_parts_of_about_a_chunk() -> None:
    room = Room(chunk_bytes=8 * LAYOUT.groups[0].head_dim * 2 * 4)  # one layer of eight tokens
    room.tell(Prefill(ask_for("a", 8), LANDING))
    room.step()
    assert [said[2] for said in room.pushes.take() if said[0] == "announce"] == [
        range(1),
        range(1, 2),
        range(2, 3),
    ]


def test_what_the_prefix_cache_held_is_announced_at_once() -> None:
    room, request = Room(), ask_for("a", 13)
    room.tell(Prefill(request, None))
    room.step()
    room.step()
    room.tell(Prefill(Request("b", request.tokens, request.sampling), LANDING))
    (token,) = room.step()
    assert (token.token, token.cached_tokens) == (expected(request)[0], 12)
    assert room.pushes.take() == [
        ("open", "b", 13),
        ("announce", "b", range(3), range(12)),
        ("announce", "b", range(2), range(12, 13)),
        ("announce", "b", range(2, 3), range(12, 13)),
        ("finish", "b"),
    ]


def test_a_waiting_prompt_has_its_landing_kept_alive() -> None:
    room = Room(blocks=4)
    room.tell(Prefill(ask_for("a", 16), LANDING), Prefill(ask_for("b", 16), LANDING))
    room.step()
    assert ("open", "b", 16) in room.pushes.said
    assert room.stage.load(1).waiting == 1


def test_without_a_landing_nothing_is_pushed_or_kept() -> None:
    room, request = Room(), ask_for("a", 7, max_tokens=1)
    room.tell(Prefill(request, None))
    (token,) = room.step()
    assert (token.token, token.finish) == (expected(request)[0], "length")
    assert (room.pushes.said, room.held) == ([], 0)


def test_an_answer_that_ends_with_its_first_token_needs_no_handoff() -> None:
    room, request = Room(), ask_for("a", 7)
    stopped = Request("a", request.tokens, Sampling(stop_token_ids=(expected(request)[0],)))
    room.tell(Prefill(stopped, LANDING))
    (token,) = room.step()
    assert token.finish == "stop"
    assert room.pushes.take()[-1] == ("cancel", "a")
    assert room.held == 2
    room.tell(ended(request, Cancelled("")))
    assert (room.step(), room.held) == ([], 0)


def test_short_prompts_share_a_step() -> None:
    room = Room(budget=8)
    for name in "abc":
        room.tell(Prefill(ask_for(name, 3), None))
    assert [event.request_id for event in room.step()] == ["a", "b"]
    assert [event.request_id for event in room.step()] == ["c"]
    assert room.runner.steps == [(3, 3, 2), (1,)]


def test_a_cancel_frees_at_once_what_nobody_reads() -> None:
    room = Room(blocks=4)
    room.tell(Prefill(ask_for("a", 16), None), Prefill(ask_for("b", 16), None))
    room.step()
    room.tell(Cancel("b"), Cancel("b"), Cancel("a", 0))
    assert (room.held, room.stage.load(1).waiting) == (4, 0)
    room.tell(Cancel("a", 2))
    assert (room.held, room.stage.load(1).running) == (0, 0)
    assert room.step() == []


def test_a_cancel_holds_what_the_sender_reads_until_it_lets_go() -> None:
    room, request = Room(), ask_for("a", 16)
    room.tell(Prefill(request, LANDING))
    room.step()
    room.tell(Cancel("a"))
    assert room.pushes.take()[-1] == ("cancel", "a")
    assert (room.step(), len(room.runner.steps), room.held) == ([], 1, 4)
    room.tell(ended(request, Cancelled("")))
    assert (room.step(), room.held) == ([], 0)


def test_a_cancel_and_the_end_of_a_handoff_may_cross() -> None:
    room, request = Room(), ask_for("a", 7)
    room.tell(Prefill(request, LANDING))
    room.step()
    room.tell(ended(request), Cancel("a"))
    assert (room.step(), room.held) == ([], 0)


def test_a_handoff_that_fails_ends_the_prompt_in_any_state() -> None:
    for blocks, steps in ((20, 2), (20, 1), (20, 0), (3, 0)):
        room, request = Room(blocks), ask_for("a", 12)
        if blocks == 3:
            room.tell(Prefill(ask_for("first", 12), None))
            room.step()
        room.tell(Prefill(request, LANDING))
        for _ in range(steps):
            room.step()
        room.tell(ended(request, TransferFailed("cut")))
        assert Failed("a", 1, "transfer_failed") in [event for _, event in room.stage.mail()]
        room.tell(Cancel("first"))
        assert room.held == 0
        failures = metrics.labelled(metrics.KV_TRANSFER_FAILURES, reason="transfer_failed")
        assert dict(room.stage.load(1).counters)[failures] == 1


def test_a_gateway_that_goes_takes_its_prompts_with_it() -> None:
    room, pushed = Room(), ask_for("pushed", 16)
    room.tell(Prefill(ask_for("mine", 16), None), Prefill(pushed, LANDING))
    room.tell(Prefill(ask_for("other", 16), None), session=2)
    room.step()
    room.tell(SessionClosed(1))
    assert room.pushes.take()[-1] == ("cancel", "pushed")
    room.tell(ended(pushed, Cancelled("")))
    assert (room.held, room.stage.load(1).running) == (4, 1)


def test_a_step_that_raises_fails_its_prompts_alone() -> None:
    room, pushed = Room(budget=8), ask_for("pushed", 6)
    room.tell(Prefill(pushed, LANDING), Prefill(ask_for("next", 16), None))
    room.runner.explode = True
    assert room.step() == [Failed("pushed", 1, "engine_error"), Failed("next", 1, "engine_error")]
    room.runner.explode = False
    assert room.held == 2  # the sender may still read them
    room.tell(ended(pushed, Cancelled("")))
    assert (room.step(), room.held, room.pool.counts().cached) == ([], 0, 0)


def test_said_twice_or_for_an_older_attempt_it_is_nothing() -> None:
    room, request = Room(), ask_for("a", 7)
    room.tell(Prefill(request, LANDING, 2))
    room.tell(Prefill(request, LANDING, 2), Prefill(request, LANDING, 1))
    assert len(room.step()) == 1
    assert room.runner.steps == [(7,)]


def test_what_cannot_be_taken_is_said() -> None:
    room = Room(blocks=2)
    room.tell(Prefill(ask_for("a", 9), LANDING), Start("b", 5))
    room.tell(Drain(), Prefill(ask_for("c", 3), None))
    assert room.step() == [
        Failed("a", 1, "too_large"),
        Failed("b", 1, "wrong_role"),
        Failed("c", 1, "draining"),
    ]
    assert room.held == 0 and room.pushes.said == []


def test_draining_finishes_what_was_taken() -> None:
    room = Room()
    room.tell(Prefill(ask_for("a", 7), None), Drain(), Tick())
    (token,) = room.step()
    assert isinstance(token, Token)


def test_each_announcement_says_when_its_kv_is_there() -> None:
    room, marks, ready = Room(), list[FakeMark](), list[Any]()

    def mark() -> FakeMark:
        marks.append(FakeMark(False))
        return marks[-1]

    def announce(request_id: str, attempt: int, announcement: Announcement) -> None:
        ready.append((request_id, announcement.layers.start, announcement.ready))

    room.cache.mark = mark  # type: ignore[method-assign]
    room.pushes.announce = announce  # type: ignore[method-assign]
    room.tell(Prefill(ask_for("a", 3), LANDING), Prefill(ask_for("b", 3, 4), LANDING))
    room.step()
    assert ready == [
        ("a", 0, marks[0]),
        ("b", 0, marks[0]),
        ("a", 2, marks[1]),
        ("b", 2, marks[1]),
    ]
    room.tell(Prefill(ask_for("c", 3, 5), None))
    room.step()
    assert len(marks) == 2  # nobody waits for a step whose KV goes nowhere
