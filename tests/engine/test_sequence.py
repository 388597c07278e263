from __future__ import annotations

import pytest

from cluster.messages import Request, Sampling
from engine.blocks import Block
from engine.sequence import Sequence


def made(tokens: int = 5, emitted: int = 0, **sampling: object) -> Sequence:
    request = Request("r", tuple(range(tokens)), Sampling(**sampling), emitted=emitted)  # type: ignore[arg-type]
    return Sequence(request, 2, 0, arrived=1.0)


def test_it_begins_with_the_prompt_and_grows_by_itself() -> None:
    sequence = made()
    sequence.tokens.append(77)
    assert sequence.tokens == [0, 1, 2, 3, 4, 77]
    assert sequence.request.tokens == (0, 1, 2, 3, 4)
    assert sequence.key == ("r", 2)


def test_remaining_tokens_are_those_without_kv() -> None:
    sequence = made()
    sequence.computed = 4
    assert sequence.remaining == 1
    sequence.tokens.append(9)
    assert sequence.remaining == 2


def test_indices_count_the_answer_across_attempts() -> None:
    assert made().next_index == 0
    resumed = made(tokens=8, emitted=3)
    assert resumed.next_index == 3
    resumed.tokens.append(9)
    assert resumed.next_index == 4


@pytest.mark.parametrize(
    ("tokens", "held", "lacking"),
    [(0, 0, 0), (1, 0, 1), (4, 0, 1), (5, 0, 2), (8, 2, 0), (9, 2, 1), (3, 2, 0)],
)
def test_blocks_it_lacks(tokens: int, held: int, lacking: int) -> None:
    sequence = made()
    sequence.blocks = [Block(number, 0) for number in range(held)]
    assert sequence.blocks_for(tokens, block_size=4) == lacking


@pytest.mark.parametrize(
    ("sampling", "answer", "ending"),
    [
        ({"max_tokens": 3}, [7], ("", None)),
        ({"max_tokens": 3}, [7, 7, 7], ("length", None)),
        ({"max_tokens": 1}, [7], ("length", None)),
        ({"max_tokens": 3, "stop_token_ids": (7, 8)}, [8], ("stop", 8)),
        ({"max_tokens": 3, "stop_token_ids": (7,)}, [1, 2, 7], ("stop", 7)),  # both: it did stop
        ({"max_tokens": 9, "min_tokens": 2, "stop_token_ids": (7,)}, [1, 7], ("", None)),
        ({"max_tokens": 9, "min_tokens": 2, "stop_token_ids": (7,)}, [1, 2, 7], ("stop", 7)),
    ],
)
def test_endings(
    sampling: dict[str, object], answer: list[int], ending: tuple[str, int | None]
) -> None:
    sequence = made(**sampling)
    told = [sequence.take(token, ()) for token in answer]
    assert (told[-1].finish, told[-1].stop_token) == ending
    assert [(token.index, token.token) for token in told] == list(enumerate(answer))


def test_spans_go_out_once() -> None:
    sequence = made(max_tokens=9)
    sequence.spans["prefill"] = 1.0
    assert sequence.take(5, ((5, -0.1),)).spans == (("prefill", 1.0),)
    assert sequence.take(6, ()).spans == ()


def test_only_the_first_step_ends_its_wait() -> None:
    sequence = made()
    sequence.schedule(3.0)
    sequence.schedule(8.0)
    assert (sequence.scheduled, sequence.spans) == (3.0, {"prefill_queue": 2.0})


def test_the_wait_of_what_was_handed_over_is_the_decoders() -> None:
    sequence = made()
    sequence.spans["transfer_tail"] = 0.5
    sequence.schedule(3.0)
    assert sequence.spans == {"transfer_tail": 0.5, "decode_admit": 2.0}
