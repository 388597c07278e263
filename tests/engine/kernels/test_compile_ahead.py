from __future__ import annotations

import pytest
import triton
import triton.language as tl

from engine.kernels.compile import Compiled, compile_ahead
from tests.engine.kernels.interpreter import compiled

pytestmark = compiled


@triton.jit
def reverse(x, out, size, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    held = tl.load(x + at, mask=at < size, other=0.0)
    tl.store(out + size - 1 - at, held * tl.sum(held), mask=at < size)


def compile_reverse(arch: int, maxnreg: int | None = None, size: int = 8192) -> Compiled:
    signature = {"x": "*fp32", "out": "*fp32", "size": "i32"}
    return compile_ahead(reverse, signature, {"SIZE": size}, arch, num_warps=1, maxnreg=maxnreg)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_small_kernel_takes_little(arch: int) -> None:
    made = compile_reverse(arch, size=128)
    assert 0 < made.registers <= 64
    assert made.local_bytes == 0
    assert made.threads == 32
    assert f"sm_{arch}" in made.ptx


def test_spills_show_as_local_memory() -> None:
    made = compile_reverse(90, maxnreg=32)
    assert made.registers <= 32
    assert made.local_bytes > 0
    assert "STL" in made.sass()


def test_an_argument_without_a_type_or_value_is_named() -> None:
    with pytest.raises(ValueError, match="size, SIZE"):
        compile_ahead(reverse, {"x": "*fp32", "out": "*fp32"}, {}, 90)
