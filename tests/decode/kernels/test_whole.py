"""The way of a GPU from plan to token, kernels and runner together, against plain torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from cluster.clock import monotonic
from cluster.messages import (
    Fingerprint,
    Generate,
    KVLayout,
    LayerGroup,
    Peer,
    Request,
    Sampling,
)
from cluster.orders import Ordered
from decode.attention import make_attend
from decode.stage import DecodeStage
from engine.allocator import Allocator
from engine.blocks import BlockPool, root_key
from engine.cache import KVCache
from engine.cuda import CudaRunner
from engine.kernels.backend import TritonOps
from engine.loop import Steps
from engine.models.decoder import Decoder
from engine.models.load import _fill_random
from engine.ops import Ops, TorchOps
from engine.runner import Runner
from kvtransfer.landing import Landings
from tests.engine.shapes import CONFIG

pytestmark = pytest.mark.interpreted

SHAPE = replace(CONFIG, hidden_size=64, heads=4, head_dim=64, windows=(0, 20), qk_norm=True)
CPU = torch.device("cpu")
REQUESTS = [
    ("greedy", 37, Sampling(max_tokens=5)),
    ("short", 1, Sampling(max_tokens=3)),
    ("drawn", 20, Sampling(max_tokens=5, temperature=1.0, top_k=20, seed=7)),
    ("penalised", 9, Sampling(max_tokens=5, temperature=0.7, frequency_penalty=0.5, seed=3)),
    ("told", 5, Sampling(max_tokens=4, logprobs=2)),
]


def answers(ops: Ops, kernels: str, make_runner: Any) -> dict[str, list[Any]]:
    """Every token that an undivided worker tells, by request."""
    model = Decoder(SHAPE, ops)
    _fill_random(model, 1, lambda done, total: None)
    groups = tuple(LayerGroup(1, SHAPE.kv_heads, SHAPE.head_dim, w) for w in SHAPE.windows)
    cache = KVCache(KVLayout(groups, "float32"), 24, 16)
    pool = BlockPool(24, 16)
    stage = DecodeStage(
        cache,
        pool,
        Allocator(pool, partial(root_key, Fingerprint("c", "w"))),
        SHAPE.windows,
        Landings(pool, cache, Peer("d", "1"), "", 10.0),
        make_attend(kernels),
        budget=24,
        max_sequences=8,
        clock=monotonic,
    )
    for name, length, sampling in REQUESTS:
        prompt = tuple((7 * number + length) % SHAPE.vocab_size for number in range(length))
        stage.apply(Ordered(1, Generate(Request(name, prompt, sampling), 1), 0.0))
    steps = Steps(stage, make_runner(model))
    said: dict[str, list[Any]] = {}
    busy = True
    while busy:
        busy = steps.step()
        for _, token in stage.mail():
            said.setdefault(token.request_id, []).append(token)
    assert pool.counts().owned == 0
    return said


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in the interpreter
def test_the_same_answers_as_plain_torch() -> None:
    wanted = answers(TorchOps(torch.float32), "torch", Runner)
    room = {"context": 128, "block_size": 16, "sequences": 8, "tokens": 24}
    cuda = partial(CudaRunner, **room, ahead=True, graph_sizes=())
    got = answers(TritonOps(torch.float32, CPU), "triton", cuda)
    assert {name: len(tokens) for name, tokens in got.items()} == {
        name: sampling.max_tokens for name, _, sampling in REQUESTS
    }
    assert {name: [t.token for t in tokens] for name, tokens in got.items()} == {
        name: [t.token for t in tokens] for name, tokens in wanted.items()
    }
    for ours, theirs in zip(got["told"], wanted["told"], strict=True):
        assert dict(ours.logprobs) == pytest.approx(dict(theirs.logprobs), abs=1e-3)
        assert len(ours.logprobs) >= 2
