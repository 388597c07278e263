from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.layers.argmax import argmax as argmax_reference
from engine.layers.norm import rms_norm as rms_norm_reference
from engine.native.ops import (
    add_rms_norm,
    argmax,
    rms_norm,
    rope_write,
    rope_write_reference,
)
from tests.native import every_kernel  # noqa: F401  takes each set in turn

EPS = torch.finfo(torch.float32).eps
SIZES = [1, 7, 8, 15, 16, 17, 33, 896, 5000]
ROWS = [0, 1, 3, 70]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(out: Tensor, expected: Tensor, roundings: int) -> None:
    """Within so many relative roundings of float32 of a float64 result."""
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=roundings * EPS, atol=1e-30)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", SIZES)
def test_rms_norm(rows: int, hidden: int) -> None:
    x, weight = random(rows, hidden) * 3, random(hidden, seed=1)
    expected = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt()
    assert_close(rms_norm(x, weight, 1e-6), expected * weight.double(), 8)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", SIZES)
def test_add_rms_norm(rows: int, hidden: int) -> None:
    x, residual, weight = random(rows, hidden), random(rows, hidden, seed=1), random(hidden, seed=2)
    total = x + residual
    before = x.clone()
    normed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total) and torch.equal(x, before)
    torch.testing.assert_close(
        normed, rms_norm_reference(total, weight, 1e-5), rtol=16 * EPS, atol=1e-30
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_broken_stays_in_its_row(value: float) -> None:
    x, weight = random(5, 100), torch.ones(100)
    x[3, 97] = value
    for out in (rms_norm(x, weight, 1e-6), add_rms_norm(x, torch.zeros(5, 100), weight, 1e-6)):
        assert out.isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("vocab", [1, 5, 16, 31, 16384, 16385, 40000])
def test_argmax(vocab: int) -> None:
    logits = random(9, vocab)
    assert torch.equal(argmax(logits), logits.argmax(1))
    assert torch.equal(argmax(-logits.abs() - 1e30), argmax_reference(-logits.abs() - 1e30))
    assert argmax(logits[:0]).tolist() == []


@pytest.mark.parametrize("vocab", [20, 40000])
def test_argmax_takes_the_lowest_of_equals(vocab: int) -> None:
    assert argmax(torch.zeros(3, vocab)).tolist() == [0, 0, 0]
    for first, second in ((1, 2), (2, 18), (3, 19), (vocab - 2, vocab - 1), (5, vocab - 1)):
        logits = random(1, vocab).clamp(max=4)
        logits[0, first] = logits[0, second] = 7
        assert argmax(logits).tolist() == [first]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("at", [0, 15, 16, 16384, 39999])
def test_argmax_refuses_a_broken_row(at: int, value: float) -> None:
    logits = random(3, 40000)
    logits[1, at] = value
    largest = logits.nan_to_num(nan=0, posinf=0, neginf=0).argmax(1).tolist()
    assert argmax(logits).tolist() == [largest[0], -1, largest[2]]
    assert argmax(torch.full((2, 20), value)).tolist() == [-1, -1]


def rope_step(
    shape: tuple[int, int, int], rows: int, dtype: torch.dtype, norms: bool
) -> tuple[list[Tensor | None], tuple[Tensor, Tensor], Tensor]:
    """(qkv, norms and angles), pages, slots"""
    heads, kv_heads, head_dim = shape
    qkv = random(rows, (heads + 2 * kv_heads) * head_dim)
    q_norm, k_norm = (random(head_dim, seed=seed) if norms else None for seed in (1, 2))
    angles = random(rows, head_dim // 2, seed=3) * 1000
    pages = torch.zeros(2, rows + 9, kv_heads, head_dim).to(dtype)
    slots = torch.randperm(rows + 9, generator=torch.Generator().manual_seed(4))[:rows]
    return [qkv, q_norm, k_norm, angles.cos(), angles.sin()], (pages[0], pages[1]), slots


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 8), (14, 2, 64), (4, 4, 80), (6, 3, 96), (2, 1, 256), (3, 1, 24)], ids=str
)
def test_rope_write(shape: tuple[int, int, int], dtype: torch.dtype, norms: bool) -> None:
    heads, kv_heads, head_dim = shape
    for rows in (1, 50):
        (qkv, q_norm, k_norm, cos, sin), (keys, values), slots = rope_step(
            shape, rows, dtype, norms
        )
        out_keys, out_values = keys.clone(), values.clone()
        expected = rope_write_reference(
            qkv, heads, kv_heads, q_norm, k_norm, 1e-6, cos, sin, keys, values, slots
        )
        q = rope_write(
            qkv, heads, kv_heads, q_norm, k_norm, 1e-6, cos, sin, out_keys, out_values, slots
        )
        assert q.shape == (rows, heads, head_dim)
        # Products of up to about 10 each, whose difference may be far smaller.
        close = 64 * EPS
        torch.testing.assert_close(q, expected, rtol=0, atol=close)
        torch.testing.assert_close(
            out_keys.float(), keys.float(), rtol=torch.finfo(dtype).eps, atol=close
        )
        assert torch.equal(out_values, values)


def test_rope_write_touches_its_slots_alone() -> None:
    (qkv, *_, cos, sin), (keys, values), slots = rope_step((4, 2, 16), 6, torch.bfloat16, False)
    keys.fill_(float("nan"))
    values.fill_(float("nan"))
    rope_write(qkv, 4, 2, None, None, 1e-6, cos, sin, keys, values, slots)
    written = torch.zeros(len(keys), dtype=torch.bool)
    written[slots] = True
    for pages in (keys, values):
        assert torch.equal(~pages.flatten(1).isnan().any(1), written)
        assert torch.equal(~pages.flatten(1).isnan().all(1), written)


def test_rope_write_keeps_a_nan_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        (qkv, *_, cos, sin), (keys, values), slots = rope_step((1, 1, 8), 1, dtype, False)
        qkv.fill_(float("nan"))
        q = rope_write(qkv, 1, 1, None, None, 1e-6, cos, sin, keys, values, slots)
        assert q.isnan().all() and keys[slots].isnan().all() and values[slots].isnan().all()


def test_rope_write_refuses_slots_that_do_not_exist() -> None:
    (qkv, *_, cos, sin), (keys, values), slots = rope_step((4, 2, 16), 6, torch.float32, False)
    for slot in (-1, len(keys)):
        slots[4] = slot
        with pytest.raises(IndexError, match=f"row 4: slot {slot}"):
            rope_write(qkv, 4, 2, None, None, 1e-6, cos, sin, keys, values, slots)
    assert not keys.any() and not values.any()


def test_refuses_what_it_would_misread() -> None:
    x, weight = random(4, 32), torch.ones(32)
    for wrong in (x.double(), x[:, ::2], x.t().contiguous().t(), x.half()):
        with pytest.raises(ValueError, match="x must be a contiguous"):
            rms_norm(wrong, weight[: wrong.shape[1]], 1e-6)
        with pytest.raises(ValueError, match="logits must be"):
            argmax(wrong)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm(x, weight[:31], 1e-6)
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(x, x[:2].clone(), weight, 1e-6)
    with pytest.raises(ValueError, match="0 logits"):
        argmax(x[:, :0])
    (qkv, *_, cos, sin), (keys, values), slots = rope_step((2, 1, 16), 3, torch.float32, False)
    with pytest.raises(ValueError, match="cos must be"):
        rope_write(qkv, 2, 1, None, None, 1e-6, cos[:, :4], sin, keys, values, slots)
    with pytest.raises(ValueError, match="slots must be"):
        rope_write(qkv, 2, 1, None, None, 1e-6, cos, sin, keys, values, slots.int())
    with pytest.raises(ValueError, match="must be alike"):
        rope_write(qkv, 2, 1, None, None, 1e-6, cos, sin, keys, values.half(), slots)
