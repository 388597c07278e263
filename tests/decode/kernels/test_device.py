"""What a step asks of a GPU: one device, no wait, nothing to compile; on one that computes nothing.

What the kernels compute is shown by the interpreter (test_whole.py).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from cluster.clock import monotonic
from cluster.errors import StartError
from cluster.messages import (
    Failed,
    Fingerprint,
    Generate,
    KVLayout,
    LayerGroup,
    Peer,
    Prefill,
    Request,
    Sampling,
)
from cluster.orders import Ordered
from decode.attention import make_attend as make_decode_attend
from decode.stage import DecodeStage
from engine.allocator import Allocator
from engine.blocks import BlockPool, root_key
from engine.cache import KVCache
from engine.cuda import CudaRunner
from engine.kernels.backend import TritonOps
from engine.loop import Steps
from engine.models.decoder import Decoder
from kvtransfer.landing import Landings
from prefill.attention import make_attend as make_prefill_attend
from prefill.stage import PrefillStage
from tests.engine.fake_gpu import FakeGpu, gpu
from tests.engine.kernels.interpreter import compiled
from tests.engine.shapes import CONFIG
from tests.prefill.test_stage import Pushes

__all__ = ["gpu"]

pytestmark = compiled

SHAPE = replace(CONFIG, hidden_size=64, heads=8, head_dim=64, windows=(0, 20), qk_norm=True)
GRAPHS = (1, 2, 4, 8, 16, 24)
SEQUENCES = 40  # more than the largest graph holds
SAMPLINGS = (
    Sampling(max_tokens=5),
    Sampling(max_tokens=5, temperature=1.0, top_k=20, seed=7),
    Sampling(max_tokens=5, temperature=0.7, frequency_penalty=0.5, seed=3),
    Sampling(max_tokens=4, logprobs=2),
    Sampling(max_tokens=4, logprobs=0, logit_bias=((3, -100.0),)),
)


class Worker:
    """Model, pages, stage and runner, without weights."""

    def __init__(self, graphs: tuple[int, ...], *, prefills: bool = False) -> None:
        device = torch.device("cuda")
        groups = tuple(LayerGroup(1, SHAPE.kv_heads, SHAPE.head_dim, w) for w in SHAPE.windows)
        self.cache = KVCache(KVLayout(groups, "bfloat16"), 600, 16, device)
        pool = BlockPool(600, 16)
        allocator = Allocator(pool, partial(root_key, Fingerprint("c", "w")))
        self.stage: DecodeStage | PrefillStage
        if prefills:
            self.stage = PrefillStage(
                self.cache,
                pool,
                allocator,
                SHAPE.windows,
                Pushes(),
                make_prefill_attend("triton"),
                budget=48,
                chunk_bytes=1 << 20,
                clock=monotonic,
            )
        else:
            self.stage = DecodeStage(
                self.cache,
                pool,
                allocator,
                SHAPE.windows,
                Landings(pool, self.cache, Peer("d", 1), "", 10.0),
                make_decode_attend("triton"),
                budget=48,
                max_sequences=SEQUENCES,
                clock=monotonic,
            )
        self.runner = CudaRunner(
            Decoder(SHAPE, TritonOps(torch.bfloat16, device)),
            context=256,
            block_size=16,
            sequences=SEQUENCES,
            tokens=48,
            ahead=not prefills,
            graph_sizes=graphs,
        )
        self.runner.warm_up(self.stage.attention)
        self._steps = Steps(self.stage, self.runner)
        self._prefills = prefills
        self._orders = 0

    def answer(self, *lengths: int) -> int:
        """Steps until prompts of these lengths are answered, every way of choosing in turn. Returns
        how many tokens were told."""
        for length in lengths:
            self._orders += 1
            sampling = SAMPLINGS[self._orders % len(SAMPLINGS)]
            request = Request(str(self._orders), tuple(range(length)), sampling)
            order = Prefill(request, None, 1) if self._prefills else Generate(request, 1)
            self.stage.apply(Ordered(1, order, 0.0))
        while self._steps.step():
            pass
        told = [event for _, event in self.stage.mail()]
        assert not [event for event in told if isinstance(event, Failed)]
        return len(told)


@pytest.mark.parametrize(
    ("graphs", "prefills"), [(GRAPHS, False), ((), False), ((), True)], ids=str
)
def test_a_step_waits_for_nothing_and_compiles_nothing(
    gpu: FakeGpu, graphs: tuple[int, ...], prefills: bool
) -> None:
    worker = Worker(graphs, prefills=prefills)
    assert gpu.compiled and not gpu.captured
    gpu.waits.clear()
    gpu.compiled.clear()
    told = worker.answer(1) + worker.answer(3, 70) + worker.answer(*range(1, SEQUENCES + 1))
    assert told == (43 if prefills else 43 * 5 - 17)
    assert gpu.waits == []
    assert gpu.compiled == []
    assert bool(gpu.replays) == bool(graphs)


def test_moving_kv_waits_for_nothing_and_compiles_nothing(gpu: FakeGpu) -> None:
    cache = Worker((), prefills=True).cache
    gpu.waits.clear()
    gpu.compiled.clear()
    for tokens in (1, 16, 37):
        slots = np.arange(tokens) * 3
        body = np.zeros(cache.token_bytes(range(1)) * tokens, np.uint8)
        waiting = cache.fill(range(1), slots, body.data)
        assert waiting is not None
        asyncio.run(_until(waiting))
        cache.scatter(range(1), slots, body.data)
    assert gpu.waits == []
    assert gpu.compiled == []


def test_no_memory_for_the_steps_is_said_at_the_start(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "logits", full)
    with pytest.raises(StartError, match="--num-blocks"):
        Worker(())


def test_what_would_be_wrong_on_a_gpu_shows(gpu: FakeGpu) -> None:
    there = torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError, match="devices"):
        there + torch.zeros(4)
    for waits in (
        lambda: there[[1, 2]],
        lambda: there[there > 0],
        there.tolist,
        lambda: bool(there[0]),
        lambda: torch.zeros(4).to("cuda", non_blocking=True),
        lambda: there.copy_(torch.zeros(4)),
    ):
        gpu.waits.clear()
        waits()
        assert gpu.waits
    gpu.waits.clear()
    torch.empty(4, pin_memory=True).to("cuda", non_blocking=True)
    assert not gpu.waits


async def _until(waiting: object) -> None:
    await waiting  # type: ignore[misc]
