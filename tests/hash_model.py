"""A model that finds every KV fault: its next token is a hash of what its whole context says.

It writes each token's id, position and layer as keys and values, through a stage's own attention,
and reads them back from the pages for every token it samples. So a lost, stale, doubled or foreign
piece of KV makes a wrong answer, and what the right one is follows from the prompt alone.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from hashlib import blake2b
from random import Random
from typing import Any

import torch

from cluster.messages import Fingerprint, KVLayout, LayerGroup, Request, Sampling
from engine.batch import Attention, Batch
from engine.cache import KVCache
from engine.layers.attention import Attend, written
from engine.loop import Outcome
from engine.sampler import Sampled
from engine.sequence import Sequence

LAYOUT = KVLayout((LayerGroup(2, 1, 4), LayerGroup(1, 2, 4, window=8)), "float32")
WINDOWS = (0, 0, 8)
FINGERPRINT = Fingerprint("config", "weights")
VOCAB = 997

torch.set_num_threads(1)  # its tensors are far too small for more


def next_token(tokens: list[int], seed: int, choice: int = 0) -> int:
    digest = blake2b(array("q", [seed, choice, *tokens]).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected(request: Request) -> list[int]:
    """The answer, from the prompt alone."""
    tokens, sampling = list(request.tokens[: request.prompt_tokens]), request.sampling
    answer: list[int] = []
    while len(answer) < sampling.max_tokens:
        token = next_token(tokens, sampling.seed, sampling.choice)
        answer.append(token)
        tokens.append(token)
        if token in sampling.stop_token_ids:
            break
    return answer


def ask_for(
    name: str, prompt: int | range | list[int], max_tokens: int = 8, **sampling: Any
) -> Request:
    """A request; a prompt given as a number is that many tokens that nobody else has."""
    if isinstance(prompt, int):
        random = Random(name)
        prompt = [random.randrange(VOCAB) for _ in range(prompt)]
    return Request(name, tuple(prompt), Sampling(max_tokens=max_tokens, **sampling))


class HashRunner:
    """Writes (token, position, layer) as keys and values; reads all of it back for a next token."""

    def __init__(self, cache: KVCache, ahead: bool = False) -> None:
        self.ahead = ahead
        self._cache = cache
        self._last: list[int] = []
        self.faults: list[str] = []
        self.steps: list[tuple[int, ...]] = []  # the token counts of each step's segments
        self.explode = False
        self.exploded = 0  # times

    def launch(self, batch: Batch, attention: Attention) -> Outcome:
        """With `ahead` nothing is computed before the outcome is asked for, as late as can be."""
        attend = attention(batch)
        if self.ahead:
            return lambda: self._forward(batch, attend)
        sampled = self._forward(batch, attend)
        return lambda: sampled

    def _forward(self, batch: Batch, attend: Attend) -> list[Sampled | None]:
        said = [t if t >= 0 else self._last[-1 - t] for t in batch.tokens.tolist()]
        sampled = self._compute(replace(batch, tokens=torch.tensor(said)), attend)
        self._last = [one.token for one in sampled]
        return [*sampled]

    def _compute(self, batch: Batch, attend: Attend) -> list[Sampled]:
        self.steps.append(batch.counts)
        if self.explode:
            self.exploded += 1
            self._last = [0] * len(batch.samples)  # for a step that was launched behind it
            raise RuntimeError("the device is on fire")
        layer = 0
        for group in LAYOUT.groups:
            for _ in range(group.layers):
                kv = _content(batch.tokens, batch.positions, layer)
                kv = kv[:, None].expand(-1, group.kv_heads, -1).contiguous()
                q = torch.zeros(len(kv), 2 * group.kv_heads, group.head_dim)
                assert attend(layer, written(q, kv, -kv)).shape == q.shape
                layer += 1
        last = {batch.rows_of(number).stop - 1: number for number in range(len(batch.counts))}
        contexts = [self._slots(batch, last[row]) for row in batch.sampled_rows.tolist()]
        return [
            Sampled(self._next(slots, sequence), ())
            for slots, sequence in zip(contexts, batch.samples, strict=True)
        ]

    def _next(self, slots: torch.Tensor, sequence: Sequence) -> int:
        # One that has ended is in a step launched behind the one that failed it: nobody takes this
        # token, and the KV that the failed step did not write is not there.
        seen = self._read(slots, strict=not sequence.ended)
        sampling = sequence.request.sampling
        return next_token(seen, sampling.seed, sampling.choice)

    def _slots(self, batch: Batch, segment: int) -> torch.Tensor:
        size = self._cache.block_size
        table = batch.block_table[segment, :, None] * size + torch.arange(size)
        return table.flatten()[: batch.lengths[segment]]

    def _read(self, slots: torch.Tensor, strict: bool) -> list[int]:
        """The tokens that the cache says are the context, which need not be the true ones."""
        tokens = self._cache.keys(0)[slots][:, 0, 0].to(torch.int64)
        for layer in range(LAYOUT.layers):
            content = _content(tokens, torch.arange(len(slots)), layer)[:, None]
            keys, values = self._cache.keys(layer)[slots], self._cache.values(layer)[slots]
            if strict and not ((keys == content).all() and (values == -content).all()):
                wrong = (keys != content).flatten(1).any(1).nonzero().flatten().tolist()
                self.faults.append(f"layer {layer}: KV of tokens {wrong} of {len(slots)} is wrong")
        return [int(token) for token in tokens]


def _content(tokens: torch.Tensor, positions: torch.Tensor, layer: int) -> torch.Tensor:
    """[tokens, 4]; ones set it apart from a cache that was never written."""
    ones = torch.ones(len(tokens))
    return torch.stack([tokens.float(), positions.float(), ones * layer, ones], dim=1)
