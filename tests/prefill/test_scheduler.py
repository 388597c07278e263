from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import Request
from engine.batch import Chunk
from engine.sequence import Sequence
from prefill.scheduler import PromptScheduler

BUDGET = 16


def waiting(*lengths: int) -> list[Sequence]:
    return [Sequence(Request(str(n), tuple(range(n))), 1, 0, 0.0) for n in lengths]


def counts(chunks: tuple[Chunk, ...]) -> list[tuple[str, int]]:
    return [(chunk.sequence.request.id, chunk.count) for chunk in chunks]


def step(scheduler: PromptScheduler, prompts: list[Sequence], budget: int) -> list[tuple[str, int]]:
    """The next step, done."""
    chunks = scheduler.chunks(prompts, budget)
    do(chunks, prompts)
    return counts(chunks)


def do(chunks: tuple[Chunk, ...], prompts: list[Sequence]) -> None:
    for chunk in chunks:
        chunk.sequence.computed += chunk.count
    prompts[:] = [prompt for prompt in prompts if prompt.remaining]


def test_short_prompts_share_a_step() -> None:
    chunks = PromptScheduler().chunks(waiting(3, 4, 5), 12)
    assert counts(chunks) == [("3", 3), ("4", 4), ("5", 5)]


def test_a_long_prompt_takes_several_and_the_whole_budget_when_alone() -> None:
    scheduler, prompts = PromptScheduler(), waiting(25)
    steps = [step(scheduler, prompts, 10) for _ in range(3)]
    assert steps == [[("25", 10)], [("25", 10)], [("25", 5)]]


def test_short_ones_go_before_a_long_one_in_a_step_of_their_own() -> None:
    scheduler, prompts = PromptScheduler(), waiting(100, 3, 2)
    assert step(scheduler, prompts, 20) == [("3", 3), ("2", 2)]
    assert step(scheduler, prompts, 20) == [("100", 20)]


def test_what_cannot_be_finished_at_once_shares_the_step() -> None:
    prompts = waiting(100, 30)
    assert step(PromptScheduler(), prompts, 20) == [("100", 10), ("30", 10)]


def test_a_long_one_is_not_starved_by_short_ones() -> None:
    scheduler, prompts = PromptScheduler(), waiting(100, 8, 8, 8)
    assert step(scheduler, prompts, 20) == [("8", 8), ("8", 8)]
    prompts += waiting(8, 8)
    assert step(scheduler, prompts, 20) == [("100", 10), ("8", 8), ("8", 2)]


def test_prompts_of_which_little_is_left_do_not_starve_it_either() -> None:
    """A step for one token takes far longer than an eightieth of one for eighty."""
    scheduler, prompts = PromptScheduler(), waiting(1000)
    its_own = []
    for number in range(40):
        prompts += waiting(1)
        if ("1000", 79) in step(scheduler, prompts, 80):
            its_own.append(number)
    assert its_own == list(range(8, 40, 9))


def test_with_nobody_else_there_it_makes_good_what_others_were_given() -> None:
    scheduler, prompts = PromptScheduler(), waiting(1000)
    for _ in range(5):  # a short one now and then never waits for more than a step
        prompts += waiting(12)
        assert step(scheduler, prompts, 20) == [("12", 12)]
        assert step(scheduler, prompts, 20) == [("1000", 20)]


def test_of_two_long_ones_the_first_is_finished_first() -> None:
    scheduler, prompts = PromptScheduler(), waiting(50, 60)
    assert [step(scheduler, prompts, 10) for _ in range(5)] == [[("50", 10)]] * 5
    assert step(scheduler, prompts, 10) == [("60", 10)]


def test_no_budget_or_nobody() -> None:
    scheduler = PromptScheduler()
    assert scheduler.chunks(waiting(3), 0) == scheduler.chunks(waiting(3), -2) == ()
    assert scheduler.chunks([], 5) == ()


@given(st.lists(st.lists(st.integers(1, 40), max_size=4), max_size=30))
def test_every_step_is_of_use_and_the_oldest_has_its_half(arrivals: list[list[int]]) -> None:
    """Whatever comes in each step, the budget is kept, and from any step on the oldest is given as
    much as all others, but for a budget that they had before and the one that this step is."""
    scheduler, prompts = PromptScheduler(), waiting(10_000)
    behind = 0
    for lengths in arrivals:
        prompts += waiting(*lengths)
        before = list(prompts)
        chunks = scheduler.chunks(prompts, BUDGET)
        given = [chunk.count for chunk in chunks]
        assert 0 < sum(given) <= BUDGET
        assert all(1 <= chunk.count <= chunk.sequence.remaining for chunk in chunks)
        assert [prompt for prompt in before if prompt in [c.sequence for c in chunks]] == [
            chunk.sequence for chunk in chunks
        ]
        own = sum(chunk.count for chunk in chunks if chunk.sequence is before[0])
        behind = max(0, behind + sum(given) - 2 * own)
        assert behind <= BUDGET
        do(chunks, prompts)
