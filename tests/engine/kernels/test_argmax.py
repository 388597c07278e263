from __future__ import annotations

import pytest
import torch

from engine.kernels import argmax as kernel
from engine.kernels.argmax import argmax, argmax_reference

pytestmark = pytest.mark.interpreted

DTYPES = [torch.float32, torch.float16]


def random(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 100, 2048, 2049, 50_257])
@pytest.mark.parametrize("rows", [1, 5])
def test_as_defined(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = random(rows, vocab, dtype)
    assert torch.equal(argmax(logits), argmax_reference(logits))


@pytest.mark.parametrize("parts", [1, 3, 1056])
def test_parts_of_a_row_do_not_show(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PROGRAMS", parts)
    logits = random(1, 20_000)
    assert torch.equal(argmax(logits), argmax_reference(logits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equals_the_lowest_index(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 9000, dtype=dtype)
    for row, places in enumerate([(), (8999,), (2050, 2049, 7000), (0, 8999)]):
        logits[row, list(places)] = 3.0
    assert argmax(logits).tolist() == [0, 8999, 2049, 0]
    assert argmax(-logits - 1).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 2047, 2048, 4999])
def test_a_broken_row_has_no_token(at: int, poison: float, dtype: torch.dtype) -> None:
    logits = random(3, 5000, dtype)
    expected = argmax(logits)
    logits[1, at] = poison
    expected[1] = -1
    assert torch.equal(argmax(logits), expected)


def test_the_largest_numbers_are_sound() -> None:
    logits = torch.full((2, 3000), torch.finfo(torch.float32).min)
    logits[1, 2999] = torch.finfo(torch.float32).max
    assert argmax(logits).tolist() == [0, 2999]


def test_rows_may_lie_apart() -> None:
    """A vocabulary padded for the matrix product: what is beside a row is not looked at."""
    wide = torch.full((3, 2100), torch.nan)
    wide[:, :2060] = random(3, 2060)
    assert torch.equal(argmax(wide[:, :2060]), argmax_reference(wide[:, :2060]))


def test_no_rows() -> None:
    assert argmax(torch.empty(0, 5)).shape == (0,)


@pytest.mark.parametrize(
    "logits", [torch.ones(5), torch.ones(2, 5).double(), torch.ones(5, 2).t(), torch.empty(2, 0)]
)
def test_what_it_does_not_do_is_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits"):
        argmax(logits)
