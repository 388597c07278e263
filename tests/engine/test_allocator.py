from __future__ import annotations

import pytest

from cluster.errors import BlocksExhausted
from cluster.messages import Request
from engine.allocator import Allocator
from engine.blocks import BlockPool, Counts
from engine.sequence import Sequence

SIZE = 4


def allocator(blocks: int = 10, caching: bool = True) -> tuple[Allocator, BlockPool]:
    pool = BlockPool(blocks, SIZE)
    return Allocator(pool, lambda salt: b"root" + salt, caching), pool


def made(tokens: int | range | list[int], salt: bytes = b"") -> Sequence:
    prompt = range(tokens) if isinstance(tokens, int) else tokens
    return Sequence(Request("r", tuple(prompt), salt=salt), 1, 0, 0.0)


def run(given: Allocator, sequence: Sequence, tokens: int | None = None) -> None:
    """As if a step had computed this many tokens, or all."""
    sequence.computed = len(sequence.tokens) if tokens is None else sequence.computed + tokens
    given.publish(sequence)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (4, 1), (5, 2), (12, 3)])
def test_a_prompt_gets_blocks_for_all_its_tokens(tokens: int, blocks: int) -> None:
    given, pool = allocator()
    sequence = made(tokens)
    given.admit(sequence)
    assert len(sequence.blocks) == blocks == pool.counts().owned
    assert sequence.computed == sequence.cached_tokens == 0


@pytest.mark.parametrize(
    ("tokens", "cached"), [(range(12), 8), (range(13), 12), (range(4), 0), ([*range(8), 99, 99], 8)]
)
def test_a_hit_leaves_at_least_one_token_to_compute(tokens: range | list[int], cached: int) -> None:
    given, pool = allocator()
    first = made(12)
    given.admit(first)
    run(given, first)
    second = made(tokens)
    given.admit(second)
    assert second.computed == second.cached_tokens == cached
    assert second.blocks[: cached // SIZE] == first.blocks[: cached // SIZE]
    assert not set(second.blocks[cached // SIZE :]) & set(first.blocks)
    assert pool.counts().owned == len({*first.blocks, *second.blocks})


def test_only_computed_and_full_blocks_are_found() -> None:
    given, _ = allocator()
    first = made(12)
    given.admit(first)
    run(given, first, tokens=7)
    second = made(13)
    given.admit(second)
    assert second.computed == 4
    run(given, first, tokens=1)
    third = made(13)
    given.admit(third)
    assert third.computed == 8


def test_answers_are_found_by_the_next_turn() -> None:
    given, _ = allocator()
    first = made(6)
    given.admit(first)
    run(given, first)
    first.tokens += [50, 51, 52]
    given.grow(first, 9)
    run(given, first)
    given.free(first)
    turn = made([*range(6), 50, 51, 52, 60])
    given.admit(turn)
    assert turn.computed == 8


def test_tenants_share_nothing() -> None:
    given, _ = allocator()
    first = made(12, salt=b"one")
    given.admit(first)
    run(given, first)
    for salt, cached in ((b"two", 0), (b"", 0), (b"one", 8)):
        sequence = made(12, salt=salt)
        given.admit(sequence)
        assert sequence.computed == cached
        given.free(sequence)


def test_without_caching_nothing_is_found() -> None:
    given, pool = allocator(caching=False)
    first = made(12)
    given.admit(first)
    run(given, first)
    given.free(first)
    assert pool.counts() == Counts(free=10, promised=0, owned=0, cached=0, total=10)
    assert given.prompt_keys(first.request) == []
    given.admit(first)
    assert first.computed == 0


@pytest.mark.parametrize(
    ("tokens", "spare", "fits"), [(40, 0, True), (41, 0, False), (36, 1, True), (37, 1, False)]
)
def test_all_or_nothing(tokens: int, spare: int, fits: bool) -> None:
    given, pool = allocator()
    sequence = made(tokens)
    if fits:
        given.admit(sequence, spare)
    else:
        with pytest.raises(BlocksExhausted):
            given.admit(sequence, spare)
        assert (sequence.blocks, pool.counts().free) == ([], 10)


def test_who_does_not_fit_lets_go_of_what_it_had_found() -> None:
    given, pool = allocator()
    first = made(12)
    given.admit(first)
    run(given, first)
    given.free(first)
    with pytest.raises(BlocksExhausted):
        given.admit(made(41))
    assert pool.counts() == Counts(free=7, promised=0, owned=0, cached=3, total=10)
    again = made(13)
    given.admit(again)
    assert again.computed == 12


def test_a_cached_prefix_in_use_costs_no_block() -> None:
    given, _ = allocator(blocks=4)
    first = made(12)
    given.admit(first)
    run(given, first)
    given.admit(made(13))  # three shared, one new
    with pytest.raises(BlocksExhausted):
        given.admit(made(13))


def test_growing_takes_a_block_only_when_one_is_full() -> None:
    given, pool = allocator(blocks=2)
    sequence = made(4)
    given.admit(sequence)
    given.grow(sequence, 4)
    assert len(sequence.blocks) == 1
    given.grow(sequence, 5)
    given.grow(sequence, 8)
    assert len(sequence.blocks) == 2
    with pytest.raises(BlocksExhausted):
        given.grow(sequence, 9)
    assert pool.counts().owned == 2


def test_the_evicted_find_their_own_blocks_again() -> None:
    given, pool = allocator()
    sequence = made(10)
    given.admit(sequence)
    run(given, sequence)
    sequence.tokens += [70, 71, 72]
    given.grow(sequence, 13)
    run(given, sequence)
    given.free(sequence)
    assert (sequence.blocks, sequence.computed) == ([], 0)
    given.admit(sequence)
    assert sequence.computed == 12 and len(sequence.blocks) == 4
    run(given, sequence)
    given.free(sequence)
    assert pool.counts().owned == 0


def test_keys_of_a_prompt_are_those_its_sequence_publishes() -> None:
    given, pool = allocator()
    sequence = made(13)
    given.admit(sequence)
    run(given, sequence)
    keys = given.prompt_keys(sequence.request)
    assert len(keys) == 3
    assert pool.match(keys) == sequence.blocks[:3]
