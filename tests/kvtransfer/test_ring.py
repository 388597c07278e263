from __future__ import annotations

import random

from kvtransfer.ring import ALIGNMENT, Ring


def test_regions_are_apart_and_aligned_and_the_lowest_is_taken_first() -> None:
    ring = Ring(10 * ALIGNMENT)
    assert [ring.take(size) for size in (1, ALIGNMENT, ALIGNMENT + 1)] == [
        0,
        ALIGNMENT,
        2 * ALIGNMENT,
    ]
    ring.free(0)
    assert ring.take(ALIGNMENT + 1) == 4 * ALIGNMENT
    assert ring.take(ALIGNMENT) == 0


def test_nothing_is_given_that_is_not_there() -> None:
    ring = Ring(4 * ALIGNMENT)
    assert ring.take(4 * ALIGNMENT + 1) is None
    assert ring.take(4 * ALIGNMENT) == 0
    assert ring.take(0) is None
    ring.free(0)
    assert ring.take(0) == 0


def test_neighbours_that_are_free_are_one_again_whatever_came_first() -> None:
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        ring = Ring(3 * ALIGNMENT)
        starts = [ring.take(ALIGNMENT) for _ in range(3)]
        for index in order:
            start = starts[index]
            assert start is not None
            ring.free(start)
        assert ring.take(3 * ALIGNMENT) == 0


def test_at_random_no_two_regions_overlap_and_all_comes_back() -> None:
    order, ring = random.Random(5), Ring(200 * ALIGNMENT)
    held: dict[int, int] = {}
    for _ in range(2000):
        if held and order.random() < 0.5:
            start = order.choice(list(held))
            del held[start]
            ring.free(start)
            continue
        size = order.randrange(1, 30 * ALIGNMENT)
        taken = ring.take(size)
        if taken is not None:
            assert taken >= 0 and taken + size <= ring.total
            assert all(taken + size <= s or s + n <= taken for s, n in held.items())
            held[taken] = size
        assert ring.taken == len(held)
    for start in held:
        ring.free(start)
    assert ring.take(ring.total) == 0


def test_a_ring_of_nothing_grows_before_it_is_used() -> None:
    ring = Ring(0)
    assert ring.take(1) is None
    ring.grow(2 * ALIGNMENT)
    assert [ring.take(1), ring.take(1), ring.take(1)] == [0, ALIGNMENT, None]
    assert ring.total == 2 * ALIGNMENT
