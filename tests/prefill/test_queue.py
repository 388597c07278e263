from __future__ import annotations

from cluster.messages import Request
from engine.allocator import Allocator
from engine.blocks import BlockPool
from engine.sequence import Sequence
from prefill.queue import PromptQueue


def queue(blocks: int = 10) -> tuple[PromptQueue, BlockPool]:
    pool = BlockPool(blocks, block_size=4)
    return PromptQueue(Allocator(pool, lambda salt: b"root")), pool


def made(name: str, tokens: int) -> Sequence:
    return Sequence(Request(name, tuple(range(tokens))), 1, 0, 0.0)


def names(sequences: list[Sequence]) -> list[str]:
    return [sequence.request.id for sequence in sequences]


def test_first_come_first_served() -> None:
    given, pool = queue()
    given.waiting.extend(made(name, 8) for name in "abc")
    assert names(given.admit(spare=0, seats=2)) == ["a", "b"]
    assert names(given.admit(spare=0, seats=2)) == ["c"]
    assert names(given.prefilling) == ["a", "b", "c"] and not given.waiting
    assert pool.counts().owned == 6


def test_nobody_overtakes_one_that_does_not_fit() -> None:
    given, pool = queue()
    given.waiting.extend((made("a", 20), made("long", 24), made("short", 1)))
    assert names(given.admit(spare=0, seats=9)) == ["a"]
    assert names(list(given.waiting)) == ["long", "short"]
    pool.release(given.prefilling[0].blocks)
    given.remove(given.prefilling[0])
    assert names(given.admit(spare=0, seats=9)) == ["long", "short"]


def test_spare_blocks_and_seats_are_respected() -> None:
    given, _ = queue()
    given.waiting.extend((made("a", 20), made("b", 20)))
    assert given.admit(spare=0, seats=0) == []
    assert given.admit(spare=0, seats=-3) == []  # more run than may
    assert names(given.admit(spare=1, seats=9)) == ["a"]
    assert given.admit(spare=1, seats=9) == []
    assert names(given.admit(spare=0, seats=9)) == ["b"]


def test_queued_tokens_are_those_not_computed() -> None:
    given, _ = queue()
    given.waiting.extend((made("a", 8), made("b", 5)))
    assert given.queued_tokens == 13
    given.admit(spare=0, seats=1)
    given.prefilling[0].computed = 3
    assert given.queued_tokens == 10
    assert names(list(given)) == ["a", "b"]


def test_removing_is_for_whoever_is_there() -> None:
    given, _ = queue()
    waiting, prefilling, neither = made("w", 8), made("p", 8), made("n", 8)
    given.waiting.extend((prefilling, waiting))
    given.admit(spare=0, seats=1)
    for sequence in (neither, waiting, prefilling, waiting):
        given.remove(sequence)
    assert list(given) == []
