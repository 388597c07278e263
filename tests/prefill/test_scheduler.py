from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import Request
from engine.batch import Chunk
from engine.sequence import Sequence
from prefill import scheduler


def waiting(*lengths: int) -> list[Sequence]:
    return [Sequence(Request(str(n), tuple(range(n))), 1, 0, 0.0) for n in lengths]


def counts(chunks: tuple[Chunk, ...]) -> list[tuple[str, int]]:
    return [(chunk.sequence.request.id, chunk.count) for chunk in chunks]


def test_short_prompts_share_a_step() -> None:
    assert counts(scheduler.chunks(waiting(3, 4, 5), 12)) == [("3", 3), ("4", 4), ("5", 5)]


def test_a_long_prompt_takes_several_and_the_whole_budget_when_alone() -> None:
    prompts = waiting(25)
    assert counts(scheduler.chunks(prompts, 10)) == [("25", 10)]
    prompts[0].computed = 20
    assert counts(scheduler.chunks(prompts, 10)) == [("25", 5)]


def test_short_ones_do_not_wait_for_a_long_one() -> None:
    assert counts(scheduler.chunks(waiting(100, 3, 2), 20)) == [("100", 15), ("3", 3), ("2", 2)]


def test_a_long_one_is_not_starved_by_short_ones() -> None:
    assert counts(scheduler.chunks(waiting(100, 8, 8, 8), 20)) == [("100", 10), ("8", 8), ("8", 2)]


def test_of_two_long_ones_the_first_is_finished_first() -> None:
    prompts = waiting(50, 60)
    steps = 0
    while prompts[0].remaining:
        for chunk in scheduler.chunks(prompts, 10):
            chunk.sequence.computed += chunk.count
        steps += 1
    assert steps == 5
    assert prompts[1].computed == 0


def test_no_budget_or_nobody() -> None:
    assert scheduler.chunks(waiting(3), 0) == scheduler.chunks(waiting(3), -2) == ()
    assert scheduler.chunks([], 5) == ()


@given(st.lists(st.integers(1, 40), max_size=8), st.integers(1, 50))
def test_the_budget_is_used_up_and_never_exceeded(lengths: list[int], budget: int) -> None:
    prompts = waiting(*lengths)
    chunks = scheduler.chunks(prompts, budget)
    assert sum(c.count for c in chunks) == min(budget, sum(lengths))
    assert all(1 <= c.count <= c.sequence.remaining for c in chunks)
    order = [prompts.index(c.sequence) for c in chunks]
    assert order == sorted(order)
    if prompts:
        assert chunks[0].count >= min(prompts[0].remaining, budget - budget // 2)
