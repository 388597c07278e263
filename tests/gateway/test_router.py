from __future__ import annotations

from dataclasses import replace

from cluster.messages import Request
from gateway.router import (
    PREFIX_STEP,
    PrefixMemory,
    View,
    choose_decode,
    choose_prefill,
    prefix_marks,
)

IDLE = View("a", 0, 0, 100, 0, 16, 0)


def name(view: View | None) -> str:
    assert view is not None
    return view.name


def test_nobody_to_choose() -> None:
    assert choose_prefill([], 10) is None
    assert choose_decode([], 10) is None


def test_prefill_goes_to_the_shorter_queue() -> None:
    busy = replace(IDLE, name="0", queued_tokens=500)
    assert name(choose_prefill([busy, IDLE], 100)) == "a"


def test_a_cached_prefix_outweighs_a_queue_as_long_as_it_saves_more() -> None:
    warm = replace(IDLE, name="warm", queued_tokens=300, cached_prefix=400)
    assert name(choose_prefill([IDLE, warm], 500)) == "warm"
    assert name(choose_prefill([IDLE, replace(warm, queued_tokens=401)], 500)) == "a"


def test_decode_goes_where_blocks_are() -> None:
    full = replace(IDLE, name="0", used_blocks=90)
    assert name(choose_decode([full, IDLE], 64)) == "a"
    large = replace(full, name="large", total_blocks=1000)
    assert name(choose_decode([large, replace(IDLE, used_blocks=20)], 64)) == "large"


def test_decode_prefers_who_has_the_prefix() -> None:
    warm = replace(IDLE, name="warm", used_blocks=10, cached_prefix=320)
    assert name(choose_decode([IDLE, warm], 336)) == "warm"


def test_ties_are_broken_by_requests_then_name() -> None:
    other = replace(IDLE, name="b")
    assert name(choose_prefill([other, IDLE], 9)) == name(choose_decode([other, IDLE], 9)) == "a"
    busy = replace(IDLE, requests=1)
    assert name(choose_prefill([other, busy], 9)) == name(choose_decode([other, busy], 9)) == "b"


def test_prefill_goes_to_who_is_done_first_and_not_to_who_has_least() -> None:
    fast = replace(IDLE, name="fast", queued_tokens=900, speed=1000.0)
    slow = replace(IDLE, name="slow", queued_tokens=0, speed=100.0)
    assert name(choose_prefill([slow, fast], 200)) == "fast"
    assert name(choose_prefill([slow, fast], 50)) == "slow"


def test_who_was_not_measured_yet_is_as_fast_as_the_others() -> None:
    known = replace(IDLE, name="known", queued_tokens=100, speed=50.0)
    assert name(choose_prefill([known, IDLE], 100)) == "a"
    assert name(choose_prefill([known, replace(IDLE, queued_tokens=101)], 100)) == "known"


def request(length: int, salt: bytes = b"", last: int = 0) -> Request:
    return Request("r", (*range(length - 1), last), salt=salt)


def test_marks_stand_for_whole_prefixes_of_one_tenant() -> None:
    long = prefix_marks(request(PREFIX_STEP * 3 + 5))
    assert len(long) == 3
    assert prefix_marks(request(PREFIX_STEP * 2 + 1)) == long[:2]
    assert prefix_marks(request(PREFIX_STEP * 2, last=7))[0] == long[0]
    assert prefix_marks(request(PREFIX_STEP * 2, last=7))[1] != long[1]
    assert not set(prefix_marks(request(PREFIX_STEP * 3, b"x"))) & set(long)
    assert prefix_marks(request(PREFIX_STEP - 1)) == []


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    memory = PrefixMemory(capacity=PREFIX_STEP * 3)
    first, second = [1, 2, 3], [4]
    memory.remember(first)
    assert memory.hit(first) == 3 * PREFIX_STEP
    memory.remember(second)
    assert memory.hit(second) == PREFIX_STEP
    assert memory.hit(first) == 2 * PREFIX_STEP  # the tail goes first: a head alone is still a hit
    memory.remember([5, 6, 7])
    assert memory.hit(first) == memory.hit(second) == 0
