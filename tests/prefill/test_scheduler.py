from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import Request
from engine.sequence import Sequence
from prefill import scheduler


def waiting(*lengths: int) -> list[Sequence]:
    return [Sequence(Request(str(n), tuple(range(n))), 1, 0, 0.0) for n in lengths]


def test_short_prompts_share_a_step() -> None:
    assert [c.count for c in scheduler.chunks(waiting(3, 4, 5), 12)] == [3, 4, 5]


def test_a_long_prompt_takes_several() -> None:
    prompts = waiting(25, 4)
    assert [c.count for c in scheduler.chunks(prompts, 10)] == [10]
    prompts[0].computed = 20
    chunks = scheduler.chunks(prompts, 10)
    assert [c.count for c in chunks] == [5, 4]
    assert all(chunk.samples for chunk in chunks)


def test_no_budget() -> None:
    assert scheduler.chunks(waiting(3), 0) == scheduler.chunks(waiting(3), -2) == ()


@given(st.lists(st.integers(1, 40), max_size=8), st.integers(1, 50))
def test_first_come_first_served_within_the_budget(lengths: list[int], budget: int) -> None:
    prompts = waiting(*lengths)
    chunks = scheduler.chunks(prompts, budget)
    assert sum(c.count for c in chunks) == min(budget, sum(lengths))
    assert [c.sequence for c in chunks] == prompts[: len(chunks)]
    assert all(chunk.samples for chunk in chunks[:-1])
