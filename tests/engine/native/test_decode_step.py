"""One call against the model as Python puts it together from the same kernels: equal to the bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from cluster.messages import KVLayout, LayerGroup, Request, Sampling
from cluster.model import ModelConfig
from engine.batch import Batch, Chunk, Plan
from engine.blocks import Block
from engine.cache import KVCache
from engine.layers.attention import Write
from engine.models.decoder import Decoder
from engine.native.attention import attend_singles
from engine.native.backend import NativeOps
from engine.native.decode_step import DecodeStep
from engine.native.linear import Storage
from engine.runner import Runner
from engine.sequence import Sequence
from tests.engine.shapes import CONFIG
from tests.native import every_kernel  # noqa: F401  takes each set in turn

BLOCK = 4
CONTEXTS = (1, 5, 23, 150, 4)
MODELS = {
    "llama": CONFIG,
    "tied, biases": replace(CONFIG, tied=True, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk-norm, windows": replace(CONFIG, qk_norm=True, windows=(0, 6)),
}


@dataclass
class Step:
    """A model, random keys and values before each sequence's last token, and that token's step."""

    model: Decoder
    cache: KVCache
    batch: Batch

    @classmethod
    def of(cls, config: ModelConfig, storage: Storage, dtype: str = "float32") -> Step:
        model = Decoder(config, NativeOps(getattr(torch, dtype), storage))
        groups = tuple(LayerGroup(1, config.kv_heads, config.head_dim, w) for w in config.windows)
        cache = KVCache(KVLayout(groups, dtype), 60, BLOCK)
        random = torch.Generator().manual_seed(2)
        for _, part in model.checkpoint_parts():
            part.fill(0, torch.randn(part.shape, generator=random) * 0.3)
        for layer in range(config.layers):
            for pages in (cache.keys(layer), cache.values(layer)):
                pages.copy_(torch.randn(pages.shape, generator=random))
        numbers = torch.randperm(cache.blocks, generator=random).tolist()
        chunks = []
        for context in CONTEXTS:
            tokens = torch.randint(config.vocab_size, (context,), generator=random).tolist()
            sequence = Sequence(Request("r", tuple(tokens), Sampling(temperature=0)), 1, 0, 0.0)
            sequence.blocks = [Block(numbers.pop(), 0) for _ in range(-(-context // BLOCK))]
            sequence.computed = context - 1
            chunks.append(Chunk(sequence, 1))
        return cls(model, cache, Batch.of(Plan(tuple(chunks)), cache))

    def attend(self, layer: int, write: Write) -> Tensor:
        keys, values = self.cache.keys(layer), self.cache.values(layer)
        q = write(keys, values, self.batch.slots)
        window = self.model.config.windows[layer]
        table = self.batch.contexts, self.batch.block_table
        return attend_singles(q, keys, values, *table, BLOCK, window, q.shape[2] ** -0.5)

    def expected(self) -> Tensor:
        hidden = self.model(self.batch.tokens, self.batch.positions, self.attend)
        return self.model.logits(hidden)

    def pages(self) -> Tensor:
        layers = range(self.model.config.layers)
        parts = (self.cache.keys, self.cache.values)
        return torch.stack([part(layer) for layer in layers for part in parts])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_equals_the_model_to_the_last_bit(
    config: ModelConfig, storage: Storage, dtype: str
) -> None:
    ours, theirs = (Step.of(config, storage, dtype) for _ in range(2))
    with torch.inference_mode():
        logits = DecodeStep(ours.model, ours.cache).logits(ours.batch)
        wanted = theirs.expected()
    assert wanted.std() > 0.3, "degenerate logits prove nothing"
    assert torch.equal(logits, wanted)
    assert torch.equal(ours.pages(), theirs.pages())


def test_a_longer_context_than_any_before() -> None:
    step = Step.of(CONFIG, "float32")
    decode = DecodeStep(step.model, step.cache)
    short = replace(
        step.batch,
        **{n: getattr(step.batch, n)[:1] for n in ("tokens", "positions", "slots", "contexts")},
        block_table=step.batch.block_table[:1],
        lengths=step.batch.lengths[:1],
    )
    with torch.inference_mode():
        first = decode.logits(short)
        assert torch.equal(decode.logits(step.batch)[:1], first)


@pytest.mark.parametrize("name, value", [("tokens", 100), ("tokens", -1), ("slots", 240)])
def test_what_does_not_exist_is_not_looked_up(name: str, value: int) -> None:
    step = Step.of(CONFIG, "float32")
    getattr(step.batch, name)[3] = value
    with pytest.raises(IndexError, match=r"^row 3: "):
        DecodeStep(step.model, step.cache).logits(step.batch)


def test_a_runner_takes_it_for_single_tokens_alone() -> None:
    step = Step.of(CONFIG, "float32")
    asked: list[Batch] = []

    def attention(batch: Batch):  # type: ignore[no-untyped-def]
        asked.append(batch)
        return step.attend

    expected = step.expected().argmax(1).tolist()
    for cache, times in ((step.cache, 0), (None, 1)):
        outcome = Runner(step.model, cache).launch(step.batch, attention)
        assert [sampled and sampled.token for sampled in outcome()] == expected
        assert len(asked) == times
    within = replace(step.batch, samples=(), sampled_rows=step.batch.sampled_rows[:0])
    assert Runner(step.model, step.cache).launch(within, attention)() == []  # parts of prompts
    assert asked[1:] == [within]
