from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import Request, Sampling
from decode import scheduler
from engine.blocks import Block
from engine.sequence import Sequence
from prefill.scheduler import PromptScheduler

SIZE = 4


def made(name: str, tokens: int, computed: int, blocks: int) -> Sequence:
    sequence = Sequence(Request(name, tuple(range(tokens)), Sampling()), 1, 0, 0.0)
    sequence.computed = computed
    sequence.blocks = [Block(n, 0) for n in range(blocks)]
    return sequence


def running(name: str, tokens: int) -> Sequence:
    return made(name, tokens, tokens - 1, -(-(tokens - 1) // SIZE))


def prefilling(name: str, tokens: int, computed: int = 0) -> Sequence:
    return made(name, tokens, computed, -(-tokens // SIZE))


def plan(run: list[Sequence], wait: list[Sequence], available: int, budget: int = 100):  # type: ignore[no-untyped-def]
    prompts = PromptScheduler()
    return scheduler.plan(run, wait, available, SIZE, budget, prompts, lambda s: len(s.blocks))


def shape(result: object) -> tuple[list[tuple[str, int]], list[str]]:
    return (
        [(c.sequence.request.id, c.count) for c in result.chunks],  # type: ignore[attr-defined]
        [s.request.id for s in result.evicted],  # type: ignore[attr-defined]
    )


def test_every_running_sequence_steps_and_prompts_share_the_rest() -> None:
    result = plan(
        [running("a", 3), running("b", 6)], [prefilling("p", 30), prefilling("q", 30)], 0, 20
    )
    assert shape(result) == ([("a", 1), ("b", 1), ("p", 18)], [])


def test_a_block_is_taken_when_there_is_one() -> None:
    assert shape(plan([running("a", 5)], [], 1)) == ([("a", 1)], [])


def test_the_youngest_gives_way() -> None:
    result = plan([running("old", 5), running("young", 6)], [], 0)
    assert shape(result) == ([("old", 1)], ["young"])


def test_those_still_prefilling_give_way_first() -> None:
    result = plan([running("old", 5), running("young", 5)], [prefilling("p", 8)], 0)
    assert shape(result) == ([("old", 1), ("young", 1)], ["p"])


def test_alone_and_out_of_blocks() -> None:
    assert shape(plan([running("a", 5)], [], 0)) == ([], [])  # it keeps what it has and waits


@given(st.lists(st.integers(2, 20), max_size=6), st.integers(0, 5))
def test_what_is_planned_fits(lengths: list[int], available: int) -> None:
    run = [running(str(i), n) for i, n in enumerate(lengths)]
    result = plan(run, [], available)
    needed = sum(c.sequence.blocks_for(c.sequence.computed + 1, SIZE) for c in result.chunks)
    assert needed <= available + sum(len(s.blocks) for s in result.evicted)
    assert [c.sequence for c in result.chunks] == run[: len(result.chunks)]
    assert len(result.chunks) + len(result.evicted) in (len(run), 0)
