"""Greedy answers through a prefill/decode pair are those of transformers, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.model import load_config
from tests.checkpoints import ARCHITECTURES
from tests.e2e.client import tokens
from tests.e2e.cluster import serving
from tests.e2e.conftest import Checkpoint
from tests.e2e.reference import Transformers, prompt_of

COUNT = 32
GREEDY = {"temperature": 0, "max_tokens": COUNT, "ignore_eos": True}

SMALL_STEPS = ("--max-num-batched-tokens", "48", "--chunk-bytes", "1024")
OTHER_BLOCKS = {"prefill": ("--block-size", "16"), "decode": ("--block-size", "64")}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Prompts of one token, of one step, of several steps; all beyond the sliding windows but one.

    Blocks differ between the pools, and a chunk on the wire holds a few tokens of one layer.
    """
    directory = checkpoint(name)
    vocab = load_config(directory).vocab_size
    transformers = Transformers(directory)
    with serving(tmp_path, directory, **OTHER_BLOCKS, flags=SMALL_STEPS) as cluster:
        for length in (1, 20, 150, 333):
            prompt = prompt_of(length, vocab)
            wanted = transformers.greedy(prompt, COUNT)
            got = tokens(cluster.url, cluster.model, prompt, **GREEDY)
            assert got == wanted, f"{length} prompt tokens"
        cluster.until_idle(2)


# 24 prompt tokens of the smallest Llama: 3 layers of 2 * 2 heads * 8 floats each.
LAYER_BYTES = 24 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    "chunk_bytes",
    [
        pytest.param(3 * LAYER_BYTES, id="1 chunk"),
        pytest.param(2 * LAYER_BYTES, id="2 chunks"),
        pytest.param(LAYER_BYTES // 24, id="72 chunks"),
    ],
)
def test_any_number_of_chunks(chunk_bytes: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("llama")
    prompt = prompt_of(24, load_config(directory).vocab_size)
    with serving(
        tmp_path,
        directory,
        prefill=("--block-size", "64"),
        decode=("--block-size", "16"),
        flags=("--chunk-bytes", str(chunk_bytes)),
    ) as cluster:
        got = tokens(cluster.url, cluster.model, prompt, **GREEDY)
    assert got == Transformers(directory).greedy(prompt, COUNT)
