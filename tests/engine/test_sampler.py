from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import Request, Sampling
from engine.sampler import gumbel, philox, sample
from engine.sequence import Sequence

VOCAB = 50


def sequence(
    output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2), **how: object
) -> Sequence:
    made = Sequence(Request("r", prompt, Sampling(**how)), 1, 0, 0.0)  # type: ignore[arg-type]
    made.tokens += output
    return made


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_answers_as_published(
    counter: tuple[int, ...], key: tuple[int, int], words: str
) -> None:
    """The known answers that come with the generator's reference implementation."""
    got = philox(counter, key)
    assert " ".join(f"{int(word):08x}" for word in got.ravel()) == words


@given(st.integers(0, 2**64 - 1), st.integers(0, 15), st.integers(0, 10**6))
def test_noise_does_not_depend_on_what_else_is_asked_for(seed: int, choice: int, at: int) -> None:
    whole = gumbel(np.arange(VOCAB), seed, choice, at)
    some = np.array([3, 17, 18, 49])
    assert np.array_equal(gumbel(some, seed, choice, at), whole[some])


def test_noise_differs_by_every_part_of_its_key() -> None:
    tokens = np.arange(VOCAB)
    made = [
        gumbel(tokens, *key)
        for key in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1 << 32, 0, 0)]
    ]
    assert len({noise.tobytes() for noise in made}) == len(made)


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(np.arange(100_000), 7, 0, 0)
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.std() == pytest.approx(1.2825, abs=0.02)


def test_tokens_come_with_their_probabilities() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = [sample(scores[None].clone(), [sequence(seed=seed)])[0].token for seed in range(4000)]
    frequencies = np.bincount(drawn, minlength=4) / len(drawn)
    assert frequencies == pytest.approx(scores.softmax(0).numpy(), abs=0.03)


def test_greedy_is_the_largest_logit_whatever_the_seed() -> None:
    rows = logits(3)
    best = rows.argmax(-1).tolist()
    got = sample(rows.clone(), [sequence(temperature=0.0, seed=s) for s in range(3)])
    assert [s.token for s in got] == best


@given(st.integers(0, 100))
def test_a_row_is_the_same_alone_and_in_company(seed: int) -> None:
    rows = logits(4, seed)
    how = [
        {"seed": 1, "top_p": 0.5},
        {"temperature": 0.0},
        {"seed": 3, "top_k": 5, "min_p": 0.1},
        {"seed": 4, "repetition_penalty": 1.5, "logprobs": 2},
    ]
    together = sample(rows.clone(), [sequence(**h) for h in how])
    alone = [sample(rows[i : i + 1].clone(), [sequence(**h)])[0] for i, h in enumerate(how)]
    assert together == alone


def kept(scores: list[float], **how: object) -> set[int]:
    """Which tokens are ever drawn."""
    row = torch.tensor([scores])
    return {sample(row.clone(), [sequence(seed=s, **how)])[0].token for s in range(300)}


def test_filters() -> None:
    scores = [3.0, 2.9, 2.8, 0.0]
    assert kept(scores) == {0, 1, 2, 3}
    assert kept(scores, top_k=2) == {0, 1}
    assert kept(scores, top_p=0.3) == {0}
    assert kept(scores, top_p=0.5) == {0, 1}
    assert kept(scores, min_p=0.5) == {0, 1, 2}
    assert kept(scores, top_k=3, top_p=0.99, min_p=0.85) == {0, 1}
    assert kept(scores, top_k=1) == {0}
    assert kept([1.0, 1.0, 1.0, 1.0], top_p=1e-9) <= {0, 1, 2, 3}


def test_penalties() -> None:
    row = torch.zeros(1, 4)
    row[0, 1] = 1.0
    assert sample(row.clone(), [sequence((1,), temperature=0.0, presence_penalty=2)])[0].token != 1
    assert (
        sample(row.clone(), [sequence((), (1,), temperature=0.0, presence_penalty=2)])[0].token == 1
    )
    assert (
        sample(row.clone(), [sequence((1,), temperature=0.0, frequency_penalty=0.6)])[0].token == 1
    )
    twice = sequence((1, 1), temperature=0.0, frequency_penalty=0.6)
    assert sample(row.clone(), [twice])[0].token != 1
    row[0] = torch.tensor([0.9, 1.0, -0.5, -1.0])
    assert (
        sample(row.clone(), [sequence((), (1,), temperature=0.0, repetition_penalty=2)])[0].token
        == 0
    )


def test_logit_bias_moves_the_choice() -> None:
    row = logits()
    assert sample(row, [sequence(temperature=0.0, logit_bias=((7, 100.0),))])[0].token == 7


def test_min_tokens_keeps_stop_tokens_away() -> None:
    row = torch.zeros(1, 4)
    row[0, 2] = 5.0
    how = {"temperature": 0.0, "stop_token_ids": (2,), "min_tokens": 2}
    assert sample(row.clone(), [sequence((1,), **how)])[0].token != 2
    assert sample(row.clone(), [sequence((1, 1), **how)])[0].token == 2


def test_logprobs_are_the_models_own() -> None:
    row = logits()
    expected = row[0].log_softmax(-1)
    got = sample(row.clone(), [sequence(seed=5, logprobs=3, logit_bias=((9, 50.0),))])[0]
    assert got.token == 9
    values, ids = expected.topk(3)
    assert [token for token, _ in got.logprobs] == [9, *ids.tolist()]
    assert [value for _, value in got.logprobs] == pytest.approx(
        [float(expected[9]), *values.tolist()]
    )
    assert len(sample(row, [sequence(logprobs=0)])[0].logprobs) == 1


def test_a_banned_token_is_never_drawn() -> None:
    how = {"temperature": 2.0, "stop_token_ids": (3,), "min_tokens": 9}
    assert kept([5.0, 1.0, 1.0, 9.0], **how) == {0, 1, 2}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_p": 0.5, "logprobs": 1}])
def test_a_broken_row_chooses_nothing_and_harms_nobody(poison: float, how: dict[str, Any]) -> None:
    rows = logits(3)
    alone = sample(rows[2:].clone(), [sequence(**how)])
    rows[1, 4] = poison
    first, broken, last = sample(rows, [sequence(**how) for _ in range(3)])
    assert broken is None
    assert first is not None and [last] == alone


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.5}])
def test_of_equal_scores_at_the_edge_the_lower_tokens_stay(how: dict[str, float]) -> None:
    row = torch.zeros(1, 6)
    drawn = {sample(row.clone(), [sequence(seed=s, **how)])[0].token for s in range(200)}
    assert drawn == {0, 1, 2}


def test_a_wide_nucleus_is_looked_at_as_a_whole() -> None:
    row = torch.zeros(1, 4000)
    drawn = {sample(row.clone(), [sequence(seed=s, top_p=0.5)])[0].token for s in range(400)}
    assert max(drawn) < 2000 and max(drawn) > 1500


def test_where_every_token_is_banned_there_is_none() -> None:
    how = {"logit_bias": tuple((token, -math.inf) for token in range(VOCAB))}
    fine, banned = sample(torch.zeros(2, VOCAB), [sequence(seed=1), sequence(seed=1, **how)])
    assert fine is not None and banned is None
