from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.kernels.rope_write import rope_write, rope_write_reference

pytestmark = pytest.mark.interpreted

# heads, kv_heads, head_dim: powers of two, none of them, and group 1
SHAPES = [(4, 2, 16), (7, 1, 80), (3, 3, 96), (14, 2, 64), (2, 1, 128), (1, 1, 256), (2, 2, 2)]


def arguments(
    shape: tuple[int, int, int],
    rows: int,
    dtype: torch.dtype = torch.float32,
    norm: bool = False,
    slots: int = 9,
) -> dict[str, Any]:
    heads, kv_heads, d = shape
    generator = torch.Generator().manual_seed(rows)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    angles = random(rows, d // 2) * 100
    pages = torch.full((2, slots, kv_heads, d), torch.nan, dtype=dtype)
    return {
        "qkv": random(rows, (heads + 2 * kv_heads) * d).to(dtype),
        "heads": heads,
        "kv_heads": kv_heads,
        "q_norm": random(d).to(dtype) if norm else None,
        "k_norm": random(d).to(dtype) if norm else None,
        "eps": 1e-6,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "keys": pages[0],
        "values": pages[1],
        "slots": torch.randperm(slots, generator=generator)[:rows],
    }


def check(how: dict[str, Any]) -> None:
    """Queries and pages as the definition's, in every slot: the NaNs of those not written too."""
    other = how | {"keys": how["keys"].clone(), "values": how["values"].clone()}
    expected, got = rope_write_reference(**other), rope_write(**how)
    unit = torch.finfo(got.dtype).eps
    # Up to three roundings to the dtype, and two products of about 4 that may cancel.
    same = {"rtol": 4 * unit, "atol": 8 * unit, "equal_nan": True}
    torch.testing.assert_close(got, expected, **same)
    torch.testing.assert_close(how["keys"], other["keys"], **same)
    assert torch.equal(how["values"].nan_to_num(7), other["values"].nan_to_num(7))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_defined(shape: tuple[int, int, int], dtype: torch.dtype, norm: bool) -> None:
    for rows in (1, 5):
        check(arguments(shape, rows, dtype, norm))


def test_a_row_that_pads_a_batch_writes_nothing() -> None:
    how = arguments((4, 2, 16), 3)
    how["slots"] = torch.tensor([4, -1, 2])
    check(how)
    assert how["keys"][[4, 2]].isfinite().all()
    assert how["keys"][[0, 1, 3, 5, 6, 7, 8]].isnan().all()


def test_pages_of_one_layer_of_many() -> None:
    """Slots of keys and values lie apart, and both in the middle of other layers."""
    how = arguments((4, 2, 16), 5)
    cache = torch.full((3, 9, 2, 2, 16), torch.nan)
    how["keys"], how["values"] = cache[1, :, 0], cache[1, :, 1]
    check(how)
    assert cache[0].isnan().all() and cache[2].isnan().all()


def test_no_rows() -> None:
    how = arguments((4, 2, 16), 0)
    assert rope_write(**how).shape == (0, 4, 16)
    assert how["keys"].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "columns"),
        ({"kv_heads": 0}, "columns"),
        ({"k_norm": None}, "together"),
        ({"q_norm": torch.ones(8)}, "q_norm"),
        ({"cos": torch.ones(2, 9)}, "cos"),
        ({"sin": torch.ones(2, 8).double()}, "sin"),
        ({"keys": torch.ones(9, 2, 8)}, "keys"),
        ({"values": torch.ones(2, 9, 16).transpose(0, 1)}, "values"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "slots"),
        ({"qkv": torch.ones(2, 128).double()}, "qkv"),
    ],
)
def test_what_it_does_not_do_is_refused(change: dict[str, Any], message: str) -> None:
    how = arguments((4, 2, 16), 2, norm=True)
    with pytest.raises(ValueError, match=message):
        rope_write(**how | change)
