"""Weights that are not what was recorded are never loaded (FAULTS 3.3, row 13)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cluster import digests
from cluster.errors import BadModel
from engine.models.load import load_model
from tests.checkpoints import build

FLIPS = 100


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build("llama", tmp_path)
    digests.write(tmp_path)
    return tmp_path


def test_a_flipped_bit_anywhere_is_refused(directory: Path) -> None:
    """safetensors itself would load nearly all of these."""
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    places = random.Random(13).sample(range(8 * len(whole)), FLIPS)
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        weights.write_bytes(damaged)
        with pytest.raises(BadModel, match=r"model\.safetensors: is sha256 .*digests\.json says"):
            load_model(directory)
    weights.write_bytes(whole)
    load_model(directory)


def test_it_loads_all_the_same_if_told_so(directory: Path) -> None:
    weights = directory / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(BadModel):
        load_model(directory)
    before = load_model(directory, skip_digest=True)
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert before.weights_digest != load_model(directory).weights_digest


def test_random_weights_need_none(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    loaded = load_model(directory, load_format="dummy")
    assert isinstance(loaded.model, torch.nn.Module)
    with pytest.raises(BadModel, match=r"model\.safetensors: missing"):
        load_model(directory)
