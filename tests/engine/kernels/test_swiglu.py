from __future__ import annotations

import pytest
import torch

from engine.kernels.swiglu import CONFIGURATION, swiglu
from engine.layers.linear import swiglu as swiglu_reference

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inner", [1, 17, 64, CONFIGURATION["BLOCK"], CONFIGURATION["BLOCK"] + 3])
@pytest.mark.parametrize("rows", [1, 3])
def test_as_defined(rows: int, inner: int, dtype: torch.dtype) -> None:
    made = torch.randn(rows, 2 * inner, generator=torch.Generator().manual_seed(inner))
    gate_up = (4 * made).to(dtype)
    unit = torch.finfo(dtype).eps
    # One rounding apart at most in each of the two products.
    torch.testing.assert_close(
        swiglu(gate_up), swiglu_reference(gate_up), rtol=3 * unit, atol=unit / 16
    )


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in the interpreter
def test_far_from_zero() -> None:
    """exp(-gate) overflows below -88 and must leave a zero, not a NaN."""
    gate_up = torch.tensor([[-200.0, -100.0, 100.0, 2.0, 2.0, 2.0]])
    assert swiglu(gate_up).tolist() == [[0.0, 0.0, 200.0]]


def test_rows_may_lie_apart() -> None:
    wide = torch.full((3, 20), torch.nan)
    wide[:, :12] = torch.arange(36.0).view(3, 12)
    torch.testing.assert_close(swiglu(wide[:, :12]), swiglu_reference(wide[:, :12]))


def test_no_rows() -> None:
    assert swiglu(torch.empty(0, 8)).shape == (0, 4)


@pytest.mark.parametrize(
    "gate_up", [torch.ones(2, 7), torch.ones(8, 2).t(), torch.ones(8), torch.ones(2, 8).double()]
)
def test_what_it_does_not_do_is_refused(gate_up: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="gate_up"):
        swiglu(gate_up)
