"""EngineHere: an undivided worker's model, cache and stage in this process, stepped by hand.

Everything between an order and its tokens is what `baton worker --role both` runs; gRPC, the event
loop and the gateway are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from cluster.clock import monotonic
from cluster.messages import (
    Cancel,
    Failed,
    Generate,
    KVLayout,
    LayerGroup,
    Peer,
    Request,
    Sampling,
    Token,
)
from cluster.model import ModelConfig
from cluster.orders import Ordered
from decode.attention import make_attend
from decode.stage import DecodeStage
from engine import loop, native
from engine.allocator import Allocator
from engine.blocks import BlockPool
from engine.cache import KVCache
from engine.models.decoder import Decoder
from engine.models.load import load_model
from engine.runner import Runner
from kvtransfer.landing import Landings

_SESSION = 1


@dataclass(frozen=True)
class Choice:
    """How to compute: the flags of a worker that change numbers or speed."""

    dtype: str = "auto"
    kernels: str = "auto"
    quantization: str = "none"

    @property
    def name(self) -> str:
        weights = self.quantization if self.quantization != "none" else self.dtype
        return f"{self.kernels} {weights}"


class EngineHere:
    """Owned by the thread that made it. `budget`: tokens a step, the size of a prompt's chunk.
    `tokens`: room for keys and values, of all `sequences` together.

    Prefix caching is off: a prompt that is measured is computed. Raises StartError, BadModel.
    """

    def __init__(
        self,
        directory: Path,
        choice: Choice,
        *,
        threads: int,
        sequences: int,
        tokens: int,
        budget: int,
        block_size: int = 16,
        make_runner: Callable[[Decoder, KVCache], loop.Runner] = Runner,
    ) -> None:
        torch.set_num_threads(threads)
        if native.available():
            native.set_threads(threads)
        loaded = load_model(
            directory,
            dtype=choice.dtype,
            kernels=choice.kernels,
            quantization=choice.quantization,
        )
        self.model = loaded.model
        self.config = loaded.config
        ops = self.model.ops
        self.kernels = ops.name
        if ops.name == "native":
            torch.set_num_threads(1)  # as a worker does: torch's threads would spin beside ours
        layout = KVLayout(_groups(self.config.windows, self.config), _name(ops.kv_dtype))
        # A block that is not full, and the one that the scheduler spares, for each sequence.
        blocks = tokens // block_size + 2 * sequences
        cache = KVCache(layout, blocks, block_size, ops.device)
        pool = BlockPool(blocks, block_size)
        self.stage = DecodeStage(
            cache,
            pool,
            Allocator(pool, lambda salt: b"bench" + salt, caching=False),
            self.config.windows,
            Landings(pool, cache, Peer("bench", 1), "", lease_s=60.0),
            make_attend(ops.name),
            budget=budget,
            max_sequences=sequences,
            clock=monotonic,
        )
        self._steps = loop.Steps(self.stage, make_runner(self.model, cache))
        self._numbers = itertools.count()

    def generate(self, ids: Sequence[int], count: int, logprobs: int | None = None) -> str:
        """Order a greedy answer of exactly `count` tokens. Returns the request's id."""
        sampling = Sampling(max_tokens=count, temperature=0.0, logprobs=logprobs)
        request = Request(str(next(self._numbers)), tuple(ids), sampling)
        self.stage.apply(Ordered(_SESSION, Generate(request, 1), 0.0))
        return request.id

    def cancel(self, request_id: str) -> None:
        self.stage.apply(Ordered(_SESSION, Cancel(request_id, 1), 0.0))

    def step(self) -> list[Token]:
        """One step, to its end: the tokens that it gave. Raises RuntimeError if one has failed."""
        self._steps.step()
        self._steps.settle()
        mail = [event for _, event in self.stage.mail()]
        failed = [event for event in mail if isinstance(event, Failed)]
        if failed:
            raise RuntimeError(f"a sequence failed: {failed[0].code}")
        return [event for event in mail if isinstance(event, Token)]


def _groups(windows: Sequence[int], shape: ModelConfig) -> tuple[LayerGroup, ...]:
    return tuple(
        LayerGroup(len(list(same)), shape.kv_heads, shape.head_dim, window)
        for window, same in groupby(windows)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
