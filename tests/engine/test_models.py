"""Our decoder against transformers: the same logits from the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.errors import BadModel, StartError
from cluster.model import ModelConfig, RopeConfig, load_config
from engine.layers.attention import Attend, Write, causal_attention_reference, written
from engine.models.decoder import Decoder
from engine.models.load import load_model
from engine.ops import TorchOps
from engine.weights import Checkpoint
from tests.checkpoints import ARCHITECTURES, build
from tests.dense_cache import DenseCache
from tests.native import needs_native

TOLERANCE = 1e-4  # of the largest logit
PROMPT = 40
STEPS = 32
KERNELS = ["torch", pytest.param("native", marks=needs_native)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _theirs(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _prompt(vocab_size: int, count: int = PROMPT, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _logits(model: Decoder, tokens: Tensor) -> Tensor:
    hidden = model(tokens, torch.arange(len(tokens)), DenseCache(model.config).attend(len(tokens)))
    return model.logits(hidden)


def _same_as_transformers(directory: Path, kernels: str = "torch") -> None:
    ours, theirs = load_model(directory, kernels=kernels).model, _theirs(directory)
    cache = DenseCache(ours.config)
    tokens = _prompt(ours.config.vocab_size)
    start = 0
    with torch.inference_mode():
        kept = None
        for step in range(1 + STEPS):
            positions = torch.arange(start, start + len(tokens))
            got = ours.logits(ours(tokens, positions, cache.attend(len(tokens))))
            out = theirs(tokens[None], past_key_values=kept, use_cache=True)
            kept, wanted = out.past_key_values, out.logits[0]
            assert got.dtype == torch.float32 and got.shape == wanted.shape
            assert wanted.std() > 0.5, "degenerate logits prove nothing"
            assert _error(got, wanted) <= TOLERANCE, f"step {step}"
            start += len(tokens)
            tokens = wanted[-1:].argmax(dim=-1)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str, kernels: str, tmp_path: Path) -> None:
    _same_as_transformers(build(name, tmp_path), kernels)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "qwen3", "mistral"])
def test_half_precision_and_shards(name: str, dtype: str, tmp_path: Path) -> None:
    build(name, tmp_path, dtype=dtype, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert load_config(tmp_path).dtype == dtype
    _same_as_transformers(tmp_path)


def test_the_old_spelling_of_rope(tmp_path: Path) -> None:
    build("llama-rope-llama3", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    rope["type"] = rope.pop("rope_type")
    config.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    path.write_text(json.dumps(config))
    _same_as_transformers(tmp_path)


# What each variant is there to show must matter to it, or agreement proves nothing.
CHANGES: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "llama-rope-llama3": lambda c: replace(c, rope=RopeConfig(theta=c.rope.theta)),
    "llama-rope-yarn": lambda c: replace(c, rope=replace(c.rope, attention_factor=1.0)),
    "qwen2-rope-yarn": lambda c: replace(c, rope=replace(c.rope, factor=1.0)),
    "llama-rope-linear": lambda c: replace(c, rope=RopeConfig(theta=c.rope.theta)),
    "qwen2-window": lambda c: replace(c, windows=(0,) * c.layers),
    "mistral-window": lambda c: replace(c, windows=(10,) * c.layers),
    "llama-biases": lambda c: replace(c, mlp_bias=False),
    "qwen3-biases": lambda c: replace(c, o_bias=False),
    "qwen2": lambda c: replace(c, qkv_bias=False),
    "qwen3": lambda c: replace(c, qk_norm=False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_part_left_out_shows(name: str, tmp_path: Path) -> None:
    right = load_model(build(name, tmp_path)).model
    wrong = Decoder(CHANGES[name](right.config), TorchOps(torch.float32))
    checkpoint = Checkpoint(tmp_path)
    with torch.inference_mode():
        for key, part in wrong.checkpoint_parts():
            for first, rows in checkpoint.read(key):
                part.fill(first, rows)
    tokens = _prompt(right.config.vocab_size)
    with torch.inference_mode():
        assert _error(_logits(wrong, tokens), _logits(right, tokens)) > 100 * TOLERANCE


def _packed(caches: list[DenseCache], chunks: list[Tensor]) -> Attend:
    """The attention of several sequences' chunks, one after another in one forward."""
    sizes = [len(chunk) for chunk in chunks]
    attends = [cache.attend(size) for cache, size in zip(caches, sizes, strict=True)]

    def attend(layer: int, write: Write) -> Tensor:
        keys, values = torch.empty((2, sum(sizes), *caches[0].shape))
        q = write(keys, values, torch.arange(sum(sizes)))
        parts = zip(attends, *(x.split(sizes) for x in (q, keys, values)), strict=True)
        return torch.cat([one(layer, written(*part)) for one, *part in parts if len(part[0])])

    return attend


@pytest.mark.parametrize("name", ["llama-odd-heads", "mistral-window"])
def test_packed_and_chunked_sequences_equal_solo_ones(name: str, tmp_path: Path) -> None:
    model = load_model(build(name, tmp_path)).model
    first, second = _prompt(300, 13, seed=2), _prompt(300, 21, seed=3)
    with torch.inference_mode():
        solo = torch.cat((_logits(model, first), _logits(model, second)))
        caches = [DenseCache(model.config), DenseCache(model.config)]
        rows: list[list[Tensor]] = [[], []]
        for begin, end in ((0, 5), (5, 13), (13, 21)):
            chunks = [first[begin:end], second[begin:end]]
            positions = torch.cat([torch.arange(begin, begin + len(chunk)) for chunk in chunks])
            logits = model.logits(model(torch.cat(chunks), positions, _packed(caches, chunks)))
            for kept, part in zip(rows, logits.split([len(c) for c in chunks]), strict=True):
                kept.append(part)
        packed = torch.cat([torch.cat(kept) for kept in rows])
    assert _error(packed, solo) <= 1e-5


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize(("queries", "start"), [(1, 0), (1, 17), (18, 0), (5, 13)])
@pytest.mark.parametrize("window", [0, 1, 4, 18])
def test_reference_attention_by_its_definition(
    heads: int, kv_heads: int, queries: int, start: int, window: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, heads, 8, generator=generator)
    k = torch.randn(start + queries, kv_heads, 8, generator=generator)
    v = torch.randn(start + queries, kv_heads, 8, generator=generator)
    got = causal_attention_reference(q, k, v, 0.3, window, start)
    for row in range(queries):
        end = start + row + 1
        begin = max(0, end - window) if window else 0
        for head in range(heads):
            shared = head // (heads // kv_heads)
            weights = (k[begin:end, shared] @ q[row, head] * 0.3).softmax(dim=0)
            torch.testing.assert_close(got[row, head], weights @ v[begin:end, shared])


def test_dtype_is_float32_on_the_cpu_unless_asked(tmp_path: Path) -> None:
    build("qwen3", tmp_path, dtype="bfloat16")
    assert load_model(tmp_path, kernels="torch").model.ops.dtype == torch.float32
    half = load_model(tmp_path, dtype="bfloat16", kernels="torch").model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    whole = load_model(tmp_path).model
    tokens = _prompt(300)
    with torch.inference_mode():
        error = _error(_logits(half, tokens), _logits(whole, tokens))
    assert 0 < error < 0.1


def test_matrices_are_held_once(tmp_path: Path) -> None:
    loaded = load_model(build("qwen2-tied", tmp_path), kernels="torch")
    held = sum(p.untyped_storage().nbytes() for p in loaded.model.parameters())
    stored = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert held == stored


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_model(build("llama", tmp_path), progress=lambda done, total: calls.append((done, total)))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1][0] == calls[-1][1] and 0.9 * size < calls[-1][1] < size


def test_dummy_weights_need_only_the_config(tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "config.json":
            path.unlink()
    one, again, other = (load_model(tmp_path, load_format="dummy", seed=s) for s in (5, 5, 6))
    assert one.weights_digest == again.weights_digest == "dummy:5"
    assert other.weights_digest == "dummy:6"
    tokens = _prompt(300)
    with torch.inference_mode():
        logits = _logits(one.model, tokens)
        assert torch.equal(logits, _logits(again.model, tokens))
        assert not torch.equal(logits, _logits(other.model, tokens))
    assert logits.isfinite().all() and logits.std() > 0


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path) -> None:
    file = build("qwen2-tied", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    _same_as_transformers(tmp_path)
    tensors["lm_head.weight"][3, 3] += 1.0
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BadModel, match=r"model\.safetensors: tensor 'lm_head\.weight' differs"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nowhere"}, "device 'nowhere'"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"quantization": "int8", "kernels": "torch"}, "needs --kernels native"),
    ],
)
def test_bad_options_are_named(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=message):
        load_model(build("llama", tmp_path), **options)  # type: ignore[arg-type]


def test_a_model_too_large_for_the_machine_says_so(tmp_path: Path) -> None:
    build("llama", tmp_path)
    path = tmp_path / "config.json"
    huge = dict(json.loads(path.read_text()), hidden_size=6 << 20, vocab_size=1 << 24)
    path.write_text(json.dumps(huge))
    with pytest.raises(StartError, match=r"GB of weights do not fit on cpu"):
        load_model(tmp_path, load_format="dummy")
