from __future__ import annotations

import pytest
import torch

from engine.kernels.norm import (
    MAX_HIDDEN,
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

pytestmark = pytest.mark.interpreted

DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 1), (3, 17), (2, 64), (1, 100), (5, 896), (2, 1025)]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    # Two roundings to the dtype, and a sum in another order: a unit in the last place each.
    unit = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, expected, rtol=3 * unit, atol=unit)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_addition_and_norm_as_defined(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight = random(shape[1], dtype=dtype, seed=2)
    held, expected_held = residual.clone(), residual.clone()
    expected = add_rms_norm_reference(x, expected_held, weight, 1e-5)
    close(add_rms_norm(x, held, weight, 1e-5), expected)
    assert torch.equal(held, expected_held)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_alone_as_defined(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=2)
    before = x.clone()
    close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    assert torch.equal(x, before)


def test_rows_may_lie_apart() -> None:
    """A view of wider memory: what is beside a row is neither read nor written."""
    wide = torch.full((4, 50), torch.nan)
    wide[:, :33] = random(4, 33, dtype=torch.float32)
    residual = wide.clone()
    x, weight = wide[:, :33], torch.ones(33)
    expected = rms_norm_reference(x + x, weight, 1e-5)
    close(add_rms_norm(x, residual[:, :33], weight, 1e-5), expected)
    assert residual[:, 33:].isnan().all()


def test_large_values_do_not_overflow_in_half_precision() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # its square is beyond float16
    weight = torch.ones(64, dtype=torch.float16)
    close(rms_norm(x, weight, 1e-5), torch.ones_like(x))


def test_no_rows() -> None:
    x = torch.empty(0, 8)
    assert add_rms_norm(x, x.clone(), torch.ones(8), 1e-5).shape == (0, 8)


def test_what_it_does_not_do_is_refused() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, torch.ones(2, 9), weight, 1e-5)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, x.half(), weight, 1e-5)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.ones(8, 2).t(), weight, 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        add_rms_norm(x, torch.ones(8, 2).t(), weight, 1e-5)
    with pytest.raises(ValueError, match="16 or 32 bits"):
        rms_norm(x.double(), weight.double(), 1e-5)
    with pytest.raises(ValueError, match="hidden"):
        rms_norm(torch.ones(1, MAX_HIDDEN + 1), torch.ones(MAX_HIDDEN + 1), 1e-5)
