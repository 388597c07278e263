"""Linear layers from packed weights, held to plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import native
from engine.layers.linear import swiglu
from engine.native.linear import PackedLinear, Storage, linear_reference, quantise_rows

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")

EPS = 2.0**-23
STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "int8")
SIZES = [(1, 1), (3, 31), (4, 32), (17, 33), (64, 48), (130, 95), (1030, 70), (2049, 16)]
ROWS = [1, 2, 4, 5, 6, 7, 12, 13, 14, 15, 29, 48, 300]


@pytest.fixture(params=native.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    threads, before = native.threads(), native.isa()
    native.use(request.param)
    yield request.param
    native.set_threads(threads)
    native.use(before)


def make(
    inputs: int, outputs: int, storage: Storage, bias: bool = True
) -> tuple[PackedLinear, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(inputs * 7919 + outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    values = torch.randn(outputs, generator=generator) if bias else None
    layer = PackedLinear(inputs, outputs, bias, storage)
    layer.fill(0, weight)
    if values is not None:
        layer.fill_bias(0, values)
    return layer, weight, values


def check(layer: PackedLinear, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    out = layer(x)
    if layer.storage == "int8":
        assert torch.equal(out, linear_reference(x, weight, bias, "int8"))
        return
    stored = weight if layer.storage == "float32" else weight.bfloat16().float()
    exact = x.double() @ stored.double().T
    # Each of n sums' terms may be off by n roundings of the running sum, of all magnitudes at most.
    bound = x.double().abs() @ stored.double().abs().T
    if bias is not None:
        exact, bound = exact + bias.double(), bound + bias.double().abs()
    limit = bound * (x.shape[1] + 1) * 2.0**-24 + 1e-30
    assert ((out.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("size", SIZES)
def test_any_size_and_number_of_rows(storage: Storage, size: tuple[int, int]) -> None:
    native.set_threads(2)
    for bias in (True, False):
        layer, weight, values = make(*size, storage, bias)
        for rows in ROWS:
            check(layer, torch.randn(rows, size[0]), weight, values)
    assert layer(torch.empty(0, size[0])).shape == (0, size[1])


def make_gated(inputs: int, inner: int, storage: Storage, bias: bool) -> PackedLinear:
    """As `make` with 2 * inner outputs, from a checkpoint's two matrices."""
    _, weight, values = make(inputs, 2 * inner, storage, bias)
    layer = PackedLinear(inputs, 2 * inner, bias, storage, gated=True)
    for first in (inner, 0):
        layer.fill(first, weight[first : first + inner])
        if values is not None:
            layer.fill_bias(first, values[first : first + inner])
    return layer


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("size", SIZES)
def test_gated(storage: Storage, size: tuple[int, int]) -> None:
    native.set_threads(2)
    inputs, inner = size
    for bias in (True, False):
        plain, _, _ = make(inputs, 2 * inner, storage, bias)
        layer = make_gated(inputs, inner, storage, bias)
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            exact = swiglu(plain(x).double())
            assert ((layer(x).double() - exact).abs() <= exact.abs() * 6 * EPS + 1e-34).all()
    assert layer(torch.empty(0, inputs)).shape == (0, inner)


def test_gated_over_the_range_of_gates() -> None:
    def of(gates: Tensor) -> Tensor:
        layer = PackedLinear(1, 2 * len(gates), bias=False, storage="float32", gated=True)
        layer.fill(0, gates[:, None])
        layer.fill(len(gates), torch.ones(len(gates), 1))
        return layer(torch.ones(1, 1))[0]

    gates = torch.linspace(-87, 100, 100_001)
    exact = torch.nn.functional.silu(gates.double())
    assert ((of(gates).double() - exact).abs() <= exact.abs() * 4 * EPS).all()
    # Beyond, where e^-x overflows: 0, as nearly as float32 has it.
    assert of(torch.linspace(-1e6, -90, 1001)).abs().max() < 1e-36


def test_what_is_no_gate_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer 8 -> 33"):
        PackedLinear(8, 33, bias=False, storage="float32", gated=True)
    layer = PackedLinear(8, 40, bias=True, storage="float32", gated=True)
    with pytest.raises(ValueError, match="does not fit"):
        layer.fill(10, torch.ones(20, 8))
    with pytest.raises(ValueError, match="does not fit"):
        layer.fill_bias(0, torch.ones(40))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(storage: Storage, threads: int) -> None:
    layer, weight, bias = make(257, 515, storage)
    for rows in (1, 3, 33, 600):
        x = torch.randn(rows, 257)
        native.set_threads(1)
        alone = layer(x)
        native.set_threads(threads)
        assert torch.equal(layer(x), alone)
    check(layer, x, weight, bias)


def test_int8_gives_the_same_bits_on_every_instruction_set() -> None:
    layer, _, _ = make(333, 77, "int8")
    x = torch.randn(19, 333)
    results = []
    for each in native.isas():
        native.use(each)
        results.append(layer(x))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("inputs", [64, 1000])
def test_int8_is_within_its_rounding_of_float32(inputs: int) -> None:
    layer, weight, bias = make(inputs, 96, "int8")
    x = torch.randn(8, inputs)
    exact = linear_reference(x, weight, bias, "float32")
    # Half a step of x against |w|, half a step of w against the quantised |x|.
    x_step, w_step = x.abs().amax(1, keepdim=True) / 127, weight.abs().amax(1) / 127
    limit = x_step / 2 * weight.abs().sum(1)
    limit = limit + w_step / 2 * (x.abs() + x_step / 2).sum(1, keepdim=True)
    assert ((layer(x) - exact).abs() <= limit * 1.001).all()
    relative = (layer(x) - exact).norm() / exact.norm()
    assert relative < 0.02


def test_int8_extremes_do_not_saturate() -> None:
    inputs = 4096
    weight = torch.ones(2, inputs)
    weight[1] = -1.0
    layer = PackedLinear(inputs, 2, bias=False, storage="int8")
    layer.fill(0, weight)
    x = torch.ones(3, inputs)
    x[1] = -1.0
    x[2, ::2] = -1.0
    check(layer, x, weight, None)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_stays_alone(storage: Storage, bad: float) -> None:
    layer, _, _ = make(65, 40, storage)
    for rows in (3, 20):
        x = torch.randn(rows, 65)
        good = layer(x)
        x[1, 64] = bad
        out = layer(x)
        assert not out[1].isfinite().any()
        others = [row for row in range(rows) if row != 1]
        assert torch.equal(out[others], good[others])


def test_a_bad_weight_shows_in_its_output_only() -> None:
    weight = torch.randn(33, 20)
    weight[7, 3] = float("nan")
    layer = PackedLinear(20, 33, bias=False, storage="int8")
    layer.fill(0, weight)
    out = layer(torch.randn(2, 20))
    assert out[:, 7].isnan().all()
    assert out.isnan().sum() == 2


def test_int8_rows_of_zeros_and_of_almost_nothing() -> None:
    layer, weight, bias = make(50, 33, "int8")
    x = torch.zeros(4, 50)
    x[1, 0], x[2, 0], x[3] = 1e-38, 1e-45, 3e38
    check(layer, x, weight, bias)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_filled_in_parts_of_any_float_type(storage: Storage, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(75, 40).to(dtype), torch.randn(75)
    layer = PackedLinear(40, 75, bias=True, storage=storage)
    for begin, end in ((50, 75), (0, 1), (1, 50)):
        layer.fill(begin, weight[begin:end])
        layer.fill_bias(begin, bias[begin:end])
    check(layer, torch.randn(9, 40), weight.float(), bias)


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_are_those_of_the_table(storage: Storage) -> None:
    layer, weight, _ = make(37, 100, storage)
    if storage == "int8":
        q, scales = quantise_rows(weight)
        stored = q.float() * scales
    else:
        stored = weight if storage == "float32" else weight.bfloat16().float()
    ids = torch.tensor([99, 0, 31, 32, 0])
    assert torch.equal(layer.rows(ids), stored[ids])
    assert torch.equal(layer.rows(torch.arange(layer.outputs)), stored)
    assert layer.rows(ids[:0]).shape == (0, 37)
    for wrong in (100, -1):
        with pytest.raises(IndexError):
            layer.rows(torch.tensor([wrong]))


@pytest.mark.parametrize(("storage", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_memory_is_one_copy(storage: Storage, size: int) -> None:
    layer, _, _ = make(128, 256, storage)
    extras = 256 * (12 if storage == "int8" else 4)
    assert layer.bytes == 128 * 256 * size + extras
    assert not list(layer.parameters())


def test_what_does_not_fit_is_refused() -> None:
    layer = PackedLinear(8, 40, bias=False, storage="float32")
    wrong: list[tuple[Any, ...]] = [(33, torch.zeros(8, 8)), (-1, torch.zeros(1, 8))]
    wrong.append((0, torch.zeros(1, 9)))
    for arguments in wrong:
        with pytest.raises(ValueError, match="does not fit"):
            layer.fill(*arguments)
    with pytest.raises(ValueError, match="does not fit"):
        layer.fill_bias(0, torch.zeros(1))
    for x in (torch.zeros(1, 9), torch.zeros(1, 8).double(), torch.zeros(8, 2).T):
        with pytest.raises(ValueError, match="float32"):
            layer(x)
    with pytest.raises(ValueError, match="int4"):
        PackedLinear(8, 8, bias=False, storage="int4")  # type: ignore[arg-type]
