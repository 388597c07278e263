from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cluster.messages import Request, Sampling
from engine.kernels import sampling as kernels
from engine.kernels.noise import NOISE_ERROR, noise, noise_words, rough_noise
from engine.kernels.sampling import (
    CAPACITY,
    MAX_VOCAB,
    SamplingTensors,
    sample,
    sample_reference,
)
from engine.kernels.sampling_tensors import Said
from engine.sampler import gumbel, philox
from engine.sampler import sample as definition
from engine.sequence import Sequence

pytestmark = pytest.mark.interpreted


def sequence(
    output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2), **how: Any
) -> Sequence:
    made = Sequence(Request("r", prompt, Sampling(**how)), 1, 0, 0.0)
    made.tokens += output
    return made


def logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def defined(rows: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return [-1 if made is None else made.token for made in definition(rows.clone(), sequences)]


def sampled(rows: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return sample(rows.clone(), SamplingTensors.of(sequences, "cpu")).tolist()


def anyhow(chance: random.Random, vocab: int) -> Sequence:
    """A sequence that asks for any mixture of what can be asked for."""

    def perhaps(*values: Any) -> Any:
        return chance.choice([chance.choice(values), None, None])

    how: dict[str, Any] = {
        "seed": chance.getrandbits(64),
        "choice": chance.randrange(4),
        "temperature": chance.choice([0.0, 0.01, 0.3, 0.7, 1.0, 1.0, 2.0]),
        "top_k": perhaps(1, 2, 5, 20, 50, vocab // 2, vocab - 1),
        "top_p": perhaps(1e-6, 0.1, 0.5, 0.9, 0.95, 0.999),
        "min_p": perhaps(0.001, 0.1, 0.5, 1.0),
        "repetition_penalty": perhaps(0.8, 1.3),
        "presence_penalty": perhaps(-0.5, 0.7, 2.0),
        "frequency_penalty": perhaps(-0.3, 0.4),
        "logit_bias": perhaps(((chance.randrange(vocab), 9.5), (vocab, -100.0))),
        "stop_token_ids": perhaps((3, vocab - 1)),
        "min_tokens": perhaps(5, 100),
    }
    if how["logit_bias"]:
        other = (how["logit_bias"][0][0] + 1) % vocab
        how["logit_bias"] = (how["logit_bias"][0], (other, -100.0))
    prompt = tuple(chance.choices(range(vocab), k=chance.randrange(1, 30)))
    output = tuple(chance.choices(range(vocab), k=chance.randrange(30)))
    return sequence(output, prompt, **{name: at for name, at in how.items() if at is not None})


@triton.jit
def noise_kernel(seed, choice, position, first, words, rough, exact, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    word = noise_words(first + at, tl.load(seed), tl.load(choice), tl.load(position))
    tl.store(words + at, word.to(tl.int64))
    tl.store(rough + at, rough_noise(word))
    tl.store(exact + at, noise(word))


def made_noise(
    seed: int, choice: int, position: int, first: int = 0, size: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(words, rough noise, exact noise) of tokens first .. first + size - 1."""
    how = SamplingTensors.of([sequence((0,) * (position - 2), seed=seed, choice=choice)], "cpu")
    made = [torch.empty(size, dtype=d) for d in (torch.int64, torch.float32, torch.float64)]
    noise_kernel[(1,)](how.seeds, how.choices, how.positions, first, *made, SIZE=size)
    words, rough, exact = (each.numpy() for each in made)
    return words, rough, exact


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize(("choice", "position"), [(0, 2), (3, 1000)])
def test_noise_words_are_the_definitions(seed: int, choice: int, position: int) -> None:
    """Bit for bit; the definition itself is held to the published answers."""
    first = 262_080
    words, _, exact = made_noise(seed, choice, position, first)
    tokens = np.arange(first, first + 64)
    made = philox(
        (tokens >> 2, np.uint64(position), np.uint64(choice), np.uint64(0)),
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    assert np.array_equal(words, made[tokens & 3, np.arange(64)])
    assert np.array_equal(exact, gumbel(tokens, seed, choice, position))


@triton.jit
def philox_kernel(counter, key, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    c0, c1, c2, c3 = (
        tl.load(counter + 0).to(tl.uint32),
        tl.load(counter + 1).to(tl.uint32),
        tl.load(counter + 2).to(tl.uint32),
        tl.load(counter + 3).to(tl.uint32),
    )
    blocks = at.to(tl.uint32) * 0 + c0
    words = tl.philox(tl.load(key), blocks, c1, c2, c3 + blocks * 0)
    tl.store(out + at, words[0].to(tl.int64))
    tl.store(out + SIZE + at, words[1].to(tl.int64))
    tl.store(out + 2 * SIZE + at, words[2].to(tl.int64))
    tl.store(out + 3 * SIZE + at, words[3].to(tl.int64))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_tritons_philox_answers_as_published(
    counter: tuple[int, ...], key: int, words: str
) -> None:
    out = torch.empty(4, 4, dtype=torch.int64)
    philox_kernel[(1,)](torch.tensor(counter), torch.tensor([key]), out, SIZE=4)
    assert " ".join(f"{int(word):08x}" for word in out[:, 0]) == words


@triton.jit
def rough_kernel(words, rough, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(rough + at, rough_noise(tl.load(words + at).to(tl.uint32)))


def test_rough_noise_is_as_near_as_it_says() -> None:
    """At both ends, where float32 has no digits left, and at the seam between the two formulas."""
    ends = torch.arange(1024)
    words = torch.cat(
        (
            ends,
            2**32 - 1 - ends,
            2**31 - 512 + ends,
            torch.randint(2**32, (2**16 - 3 * 1024,), generator=torch.Generator().manual_seed(0)),
        )
    )
    rough = torch.empty(2**16)
    rough_kernel[(1,)](words, rough, SIZE=2**16)
    exact = -torch.log(-torch.log((words.double() + 0.5) / 2**32))
    # A tenth: on a GPU the logarithm itself is an approximation, of 22 bits.
    assert float((rough.double() - exact).abs().max()) < NOISE_ERROR.value / 10


@pytest.mark.parametrize("vocab", [61, 1500, 4099])
def test_the_reference_is_the_definition(vocab: int) -> None:
    """A thousand rows each of random parameters; the kernel is held to both below."""
    chance = random.Random(vocab)
    for step in range(40):
        rows = logits(25, vocab, seed=step, spread=chance.choice([0.1, 1.0, 3.0]))
        sequences = [anyhow(chance, vocab) for _ in rows]
        how = SamplingTensors.of(sequences, "cpu")
        assert sample_reference(rows, how).tolist() == defined(rows, sequences)


@pytest.mark.parametrize("vocab", [61, 1500, 4099])
def test_the_same_tokens_as_the_definition(vocab: int) -> None:
    chance = random.Random(vocab + 1)
    for step in range(4):
        rows = logits(25, vocab, seed=step, spread=chance.choice([0.1, 1.0, 3.0]))
        sequences = [anyhow(chance, vocab) for _ in rows]
        assert sampled(rows, sequences) == defined(rows, sequences)


def test_many_free_draws() -> None:
    """Rows without filters, where float32 rules out and float64 decides."""
    rows = logits(200, 130, spread=0.5)
    sequences = [sequence(seed=7, choice=row, temperature=1.3) for row in range(200)]
    drawn = sampled(rows, sequences)
    assert drawn == defined(rows, sequences)
    assert len(set(drawn)) > 50


@pytest.mark.parametrize(
    "how",
    [
        {"top_k": 3},
        {"top_k": 13},
        {"top_p": 0.3},
        {"top_p": 0.6},
        {"top_k": 20, "top_p": 0.37},
        {"top_k": 20, "top_p": 0.83},
        {"top_k": 9, "min_p": 0.5},
        {"temperature": 0.0},
    ],
)
def test_of_equals_the_lower_token_ids_are_kept(how: dict[str, Any]) -> None:
    """Three values in all, so that every boundary lies within a run of equals."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, (12, 150), generator=generator).float() * 0.5
    rows[rows == 0] = -0.0  # no other value than zero
    rows[:, 3::5] = 0.0
    tensors = SamplingTensors.of([sequence(seed=row, **how) for row in range(12)], "cpu")
    assert torch.equal(sample(rows.clone(), tensors), sample_reference(rows, tensors))


@pytest.mark.parametrize("how", [{"top_k": 30}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.9}, {}])
def test_a_shortlist_that_overflows(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the whole row is searched, with the same result."""
    monkeypatch.setattr(kernels, "CAPACITY", 8)
    rows = logits(4, 1500, spread=1.0)
    rows[3] = 1.0
    sequences = [sequence(seed=row, temperature=0.8, **how) for row in range(4)]
    tensors = SamplingTensors.of(sequences, "cpu")
    assert torch.equal(sample(rows.clone(), tensors), sample_reference(rows, tensors))


def test_more_equals_than_a_shortlist_holds() -> None:
    rows = torch.zeros(2, CAPACITY + 1100)
    rows[:, 0] = -1.0
    assert sampled(rows, [sequence(temperature=0.0), sequence(top_k=1, seed=5)]) == [1, 1]


@pytest.mark.parametrize("parts", [1, 3, 1056])
def test_parts_of_a_row_do_not_show(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", parts)
    rows = logits(4, 9000)
    how = [{}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.95}, {"min_p": 0.05}]
    sequences = [sequence(seed=row, **each) for row, each in enumerate(how)]
    assert sampled(rows, sequences) == defined(rows, sequences)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_chooses_nothing_and_harms_nobody(poison: float) -> None:
    rows = logits(6, 1100)
    how: list[dict[str, Any]] = [
        {"seed": 1},
        {"temperature": 0.0},
        {"top_p": 0.5},
        {"top_k": 5},
        {"logit_bias": ((1099, -50.0),)},
        {"stop_token_ids": (1099,), "min_tokens": 9},
    ]
    sequences = [sequence(**each) for each in how]
    sound = sampled(rows, sequences)
    assert sound == defined(rows, sequences)
    for row in range(len(how)):
        broken = rows.clone()
        broken[row, 1099] = poison
        expected = [-1 if at == row else token for at, token in enumerate(sound)]
        assert sampled(broken, sequences) == expected


def test_when_everything_is_banned_there_is_no_token() -> None:
    everything = sequence(stop_token_ids=tuple(range(8)), min_tokens=3)
    assert sampled(logits(1, 8), [everything]) == [-1]


def test_a_tiny_temperature_does_not_overflow_into_a_wrong_token() -> None:
    rows = logits(2, 300, spread=30.0)
    sequences = [sequence(seed=seed, temperature=1e-5, top_p=p) for seed, p in ((1, 1.0), (2, 0.9))]
    assert sampled(rows, sequences) == rows.argmax(-1).tolist()


def test_rows_may_lie_apart() -> None:
    wide = torch.full((3, 200), torch.nan)
    wide[:, :130] = logits(3, 130)
    sequences = [sequence(seed=seed, top_k=9) for seed in range(3)]
    tokens = sample(wide[:, :130], SamplingTensors.of(sequences, "cpu"))
    assert tokens.tolist() == defined(logits(3, 130), sequences)
    assert wide[:, 130:].isnan().all()


def test_what_was_said_is_counted_once_and_forgotten_with_its_sequence() -> None:
    """The same upload with counts kept from step to step as without; sequences come and go."""
    said = Said()
    chance = random.Random(3)
    running = [anyhow(chance, 40) for _ in range(6)]
    for step in range(12):
        kept = SamplingTensors.of(running, "cpu", said)
        fresh = SamplingTensors.of(running, "cpu")
        for name in ("starts", "tokens", "biases", "divisors", "penalties"):
            assert torch.equal(getattr(kept, name), getattr(fresh, name)), name
        for each in running:
            each.tokens.append(chance.randrange(40))
        running[step % 6] = anyhow(chance, 40)
    SamplingTensors.of([], "cpu", said)
    assert not said._counts


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17])
def test_where_columns_begin_never_has_a_kernel_compiled_anew(rows: int) -> None:
    sequences = [sequence(seed=row, logit_bias=((3, 1.0),)) for row in range(rows)]
    tensors = SamplingTensors.of(sequences, "cpu")
    for column in fields(SamplingTensors):
        assert getattr(tensors, column.name).data_ptr() % 16 == 0, column.name
    assert tensors.seeds.tolist() == list(range(rows)) and tensors.tokens.tolist() == [3] * rows


def test_no_rows() -> None:
    assert sample(torch.empty(0, 9), SamplingTensors.of([], "cpu")).shape == (0,)


def test_what_it_does_not_do_is_refused() -> None:
    one = SamplingTensors.of([sequence()], "cpu")
    with pytest.raises(ValueError, match="float32"):
        sample(torch.ones(1, 9).half(), one)
    with pytest.raises(ValueError, match="contiguous"):
        sample(torch.ones(9, 2).t(), one)
    with pytest.raises(ValueError, match="vocab"):
        sample(torch.empty(1, MAX_VOCAB + 1), one)
    with pytest.raises(ValueError, match="rows"):
        sample(torch.ones(2, 9), one)
