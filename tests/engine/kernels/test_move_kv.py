from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cluster.messages import KVLayout, LayerGroup
from engine.cache import KVCache
from engine.kernels.move_kv import (
    ELEMENTS,
    gather_kv,
    gather_kv_reference,
    scatter_kv,
    scatter_kv_reference,
)

pytestmark = pytest.mark.interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # moved as integers: no arithmetic


def pages(
    layers: int = 3, slots: int = 11, heads: int = 3, head_dim: int = 10, dtype: Any = torch.float32
) -> torch.Tensor:
    shape = (layers, 2, slots, heads, head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(slots)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [None, range(1, 2), range(1, 3), range(3)])
@pytest.mark.parametrize("tokens", [1, 4, 11])
def test_as_defined(tokens: int, heads: range | None, dtype: torch.dtype) -> None:
    held = pages(dtype=dtype)
    slots = torch.randperm(11, generator=torch.Generator().manual_seed(tokens))[:tokens]
    wire = gather_kv(held, slots, heads)
    assert torch.equal(wire, gather_kv_reference(held, slots, heads))
    target = torch.full_like(held, 7)
    expected = target.clone()
    scatter_kv(target, slots, wire, heads)
    scatter_kv_reference(expected, slots, wire, heads)
    assert torch.equal(target, expected)


def test_a_token_larger_than_a_program() -> None:
    held = pages(layers=1, slots=3, heads=ELEMENTS // 64 + 1, head_dim=64, dtype=torch.float16)
    slots = torch.tensor([2, 0])
    assert torch.equal(gather_kv(held, slots), gather_kv_reference(held, slots))


def test_bits_of_no_number_survive() -> None:
    held = pages(layers=1)
    held.view(torch.int32)[:] = torch.arange(held.numel()).view(held.shape) + 0x7F800001  # NaNs
    slots = torch.arange(11)
    assert torch.equal(gather_kv(held, slots).view(torch.int32), held.view(torch.int32))


def test_some_layers_into_given_memory() -> None:
    """A range of layers is a view; in memory that is too large only the given part is touched."""
    held, slots = pages(layers=5), torch.tensor([3, 9])
    memory = torch.full((2 * 2 * 2 * 30 + 4,), 7.0)
    out = memory[: 2 * 2 * 2 * 30].view(2, 2, 2, 3, 10)
    assert gather_kv(held[1:3], slots, out=out) is out
    assert torch.equal(out, gather_kv_reference(held[1:3], slots))
    assert (memory[-4:] == 7).all()
    target = torch.full_like(held, 7)
    scatter_kv(target[3:5], slots, out)
    assert torch.equal(target[3:5][:, :, slots], out)
    assert (target[:3] == 7).all()


def test_the_wire_form_is_the_caches() -> None:
    cache = KVCache(KVLayout((LayerGroup(2, 3, 10),), "float32"), blocks=3, block_size=4)
    for layer in range(2):
        cache.keys(layer).copy_(pages(slots=12)[layer, 0])
        cache.values(layer).copy_(pages(slots=12)[layer, 1])
    slots = np.array([7, 2, 11], dtype=np.int64)
    held = torch.stack([torch.stack((cache.keys(at), cache.values(at))) for at in range(2)])
    wire = gather_kv(held, torch.from_numpy(slots), range(1, 3))
    assert wire.numpy().tobytes() == bytes(cache.gather(range(2), slots, range(1, 3)))


def test_nothing_to_move() -> None:
    held, none = pages(), torch.empty(0, dtype=torch.int64)
    assert gather_kv(held, none).shape == (3, 2, 0, 3, 10)
    scatter_kv(held, none, gather_kv(held, none))
    assert torch.equal(held, pages())


def test_what_it_does_not_do_is_refused() -> None:
    held, slots = pages(), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="pages"):
        gather_kv(held[0], slots)
    with pytest.raises(ValueError, match="pages"):
        gather_kv(held.double(), slots)
    with pytest.raises(ValueError, match="contiguous"):
        gather_kv(held.transpose(3, 4), slots)
    with pytest.raises(ValueError, match="heads"):
        gather_kv(held, slots, range(2, 4))
    with pytest.raises(ValueError, match="slots"):
        gather_kv(held, slots.int())
    with pytest.raises(ValueError, match="wire"):
        gather_kv(held, slots, out=torch.empty(3, 2, 3, 3, 10))
    with pytest.raises(ValueError, match="wire"):
        scatter_kv(held, slots, torch.empty(3, 2, 2, 3, 10).half())
