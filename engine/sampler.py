"""Sampler: logits to tokens, the same token whatever else is in the batch.

The noise is a pure function of (seed, choice, position, token id), made by Philox-4x32-10, a
counter-based generator: an answer that is resumed on another worker draws what it would have
drawn, and a GPU kernel can draw the same.

Source  Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox);
        Gumbel-max sampling; min-p: Nguyen et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cluster.messages import Sampling
from engine.layers.argmax import argmax
from engine.sequence import Sequence

_NUCLEUS: Final = 1024


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token and, if asked for, log-probabilities of it and of the most likely ones."""

    token: int
    logprobs: tuple[tuple[int, float], ...] = ()


class Choose(Protocol):
    """What kernels there are to choose with. `engine.ops` has them."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor: ...

    def draw(self, candidates: Candidates, noise: Noise) -> int: ...


@dataclass(frozen=True, slots=True)
class Noise:
    """What noise is a function of, besides the token."""

    seed: int
    choice: int
    position: int  # of the token to be drawn in its sequence, prompt included


@dataclass(frozen=True, slots=True)
class Candidates:
    """Scores [n] float32, on the CPU; `ids` [n] int64 are their tokens, none: token i is number i.

    Only finite scores that reach `least` may be drawn. `likely` is the index of a high one.
    """

    scores: torch.Tensor
    ids: torch.Tensor | None = None
    least: float = -math.inf
    likely: int = 0


class Plainly:
    """Choosing in plain torch and numpy: the definition."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return argmax(logits)

    def draw(self, candidates: Candidates, noise: Noise) -> int:
        return draw(candidates, noise)


def sample(
    logits: torch.Tensor, sequences: Iterable[Sequence], choose: Choose | None = None
) -> list[Sampled | None]:
    """Choose one token for each row of `logits` [rows, vocab] float32, which may be overwritten.

    A row that holds a NaN or an infinity yields None: whatever it was computed from is broken, and
    its largest entry would be an answer to nothing. So does one with every token banned.
    """
    choose = choose or Plainly()
    best = choose.argmax(logits).tolist()
    return [
        None
        if token < 0
        else Sampled(token)
        if is_plain(sequence)
        else _sample_one(row, sequence, choose)
        for row, sequence, token in zip(logits, sequences, best, strict=True)
    ]


def foreseeable(sequence: Sequence) -> bool:
    """Whether a token can be chosen before the host knows the one before it."""
    sampling = sequence.request.sampling
    return not _has_penalties(sampling) and sequence.next_index >= sampling.min_tokens


def is_plain(sequence: Sequence) -> bool:
    """Whether its token is the largest logit's and nothing is to be said of the others."""
    sampling = sequence.request.sampling
    return (
        sampling.temperature == 0
        and sampling.logprobs is None
        and not sampling.logit_bias
        and not _has_penalties(sampling)
        and sequence.next_index >= sampling.min_tokens
    )


def _has_penalties(sampling: Sampling) -> bool:
    return (
        sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
        or sampling.repetition_penalty != 1
    )


def _sample_one(logits: torch.Tensor, sequence: Sequence, choose: Choose) -> Sampled | None:
    """One row [vocab]. Log-probabilities are those before bias, penalties and filters."""
    sampling = sequence.request.sampling
    raw = logits.log_softmax(dim=-1) if sampling.logprobs is not None else None
    if sampling.logit_bias:
        for token, bias in sampling.logit_bias:
            logits[token] += bias
    if sequence.next_index < sampling.min_tokens and sampling.stop_token_ids:
        logits[list(sampling.stop_token_ids)] = -torch.inf
    if _has_penalties(sampling):
        penalise(logits, sequence.tokens, sequence.request.prompt_tokens, sampling)
    if sampling.temperature == 0:
        token = int(logits.argmax())
    else:
        candidates = _keep(logits / sampling.temperature, sampling)
        noise = Noise(sampling.seed, sampling.choice, position=len(sequence.tokens))
        token = choose.draw(candidates, noise)
        if token < 0:
            return None
    return Sampled(token, () if raw is None else top_logprobs(raw, token, sampling.logprobs or 0))


def penalise(
    logits: torch.Tensor, tokens: list[int], prompt_tokens: int, sampling: Sampling
) -> None:
    """Push down, in place, what has been said.

    Repetition counts prompt and answer, presence and frequency the answer alone, as the OpenAI
    definition of the two and the CTRL paper's of the first have it.
    """
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(tokens)))
        scores = logits[seen]
        logits[seen] = torch.where(
            scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty
        )
    answer = tokens[prompt_tokens:]
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        said, counts = np.unique(answer, return_counts=True)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * counts
        logits[torch.from_numpy(said)] -= torch.from_numpy(penalties).to(logits.dtype)


def _keep(scaled: torch.Tensor, sampling: Sampling) -> Candidates:
    """The candidates left by min-p, top-k and top-p."""
    highest, likely = scaled.max(dim=-1)
    least = float(highest + math.log(sampling.min_p)) if sampling.min_p > 0 else -math.inf
    if sampling.top_k <= 0 and sampling.top_p >= 1:
        return Candidates(scaled, least=least, likely=int(likely))
    count = min(sampling.top_k, len(scaled)) if sampling.top_k > 0 else len(scaled)
    if sampling.top_p >= 1:
        return Candidates(*_top(scaled, count), least=least)
    # A nucleus is nearly always among the first few: sorting all of a vocabulary is for nothing.
    whole = None if sampling.top_k > 0 else (scaled.double() - highest).exp().sum()
    for looked_at in (count,) if whole is None else (min(_NUCLEUS, count), count):
        scores, ids = _top(scaled, looked_at)
        weights = (scores.double() - highest).exp()
        mass = weights.sum() if whole is None else whole
        before = weights.cumsum(dim=-1) - weights
        keep = int((before < sampling.top_p * mass).sum())
        if keep < looked_at:
            break
    return Candidates(scores[:keep], ids[:keep], least=least)


def _top(scaled: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest scores and their tokens, highest first; of equal ones the lower token."""
    lowest = scaled.topk(count).values[-1]
    ids = (scaled >= lowest).nonzero().flatten()
    scores, order = scaled[ids].sort(descending=True, stable=True)
    return scores[:count], ids[order[:count]]


def draw(candidates: Candidates, noise: Noise) -> int:
    """The token with the highest score + noise, -1 if none may be drawn; defines `Ops.draw`."""
    scores = candidates.scores
    ids = torch.arange(len(scores)) if candidates.ids is None else candidates.ids
    kept = torch.isfinite(scores) & (scores >= candidates.least)
    tokens, values = ids[kept].numpy(), scores[kept].double().numpy()
    if not len(tokens):
        return -1  # all are banned
    drawn = values + gumbel(tokens, noise.seed, noise.choice, noise.position)
    return int(tokens[int(np.argmax(drawn))])


def top_logprobs(raw: torch.Tensor, token: int, alternatives: int) -> tuple[tuple[int, float], ...]:
    values, ids = raw.topk(alternatives)
    best = zip(ids.tolist(), values.tolist(), strict=True)
    return ((token, float(raw[token])), *best)


def gumbel(
    tokens: npt.NDArray[np.int64], seed: int, choice: int, position: int
) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise for each of `tokens`, the same wherever and whenever it is asked for.

    Each Philox block of four words serves four consecutive token ids.
    """
    blocks, inverse = np.unique(tokens >> 2, return_inverse=True)
    words = philox(
        (blocks, np.uint64(position), np.uint64(choice), np.uint64(0)),
        (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF),
    )
    uniform = (words[tokens & 3, inverse] + 0.5) / 2.0**32
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def philox(counter: tuple[object, ...], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Philox-4x32-10: four 32-bit words per counter, as [4, n] in uint64."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0 = (right >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (left >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = right & low, left & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])
