"""The native library itself: what is found, which kernels are in use, threads, the GIL."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine import native
from engine.native.linear import PackedLinear, linear_reference

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads, isa = native.threads(), native.isa()
    yield
    native.set_threads(threads)
    if isa:
        native.use(isa)


def make_layer(inputs: int = 512, outputs: int = 512) -> tuple[PackedLinear, torch.Tensor]:
    weight = torch.randn(outputs, inputs)
    layer = PackedLinear(inputs, outputs, bias=False, storage="float32")
    layer.fill(0, weight)
    return layer, weight


def test_either_there_or_says_why_not() -> None:
    assert native.available() == bool(native.isas()) == (native.why_not() == "")
    assert native.isa() in native.isas() if native.available() else native.isa() == ""


def test_without_modules_everything_still_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_cpu", "_avx2", "_avx512", "_avx512_vnni"):
        monkeypatch.setitem(sys.modules, f"engine.native.{name}", None)  # an import of it fails
    kept = dict(vars(native))
    try:
        without = importlib.reload(native)
        assert not without.available()
        assert "not built" in without.why_not()
        assert without.isa() == "" and without.isas() == ()
        without.set_threads(2)
        assert without.tasks_done() == 0
        with pytest.raises(RuntimeError, match="not built"):
            PackedLinear(8, 8, bias=False, storage="float32")
    finally:
        vars(native).update(kept)


@needs_native
def test_kernels_are_those_of_the_instruction_set_in_use() -> None:
    found = set()
    for isa in native.isas():
        native.use(isa)
        assert native.isa() == isa
        found.add(native.kernels.linear_float32)
    assert len(found) == len(native.isas())
    with pytest.raises(KeyError):
        native.use("mmx")


@needs_native
def test_arguments_are_checked_by_count_and_type() -> None:
    with pytest.raises(TypeError, match="takes 1 arguments, not 0"):
        native.kernels.set_threads()
    with pytest.raises(TypeError):
        native.kernels.set_threads("two")
    with pytest.raises(OverflowError):
        native.kernels.set_threads(1 << 64)


def test_at_least_one_thread() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        native.set_threads(0)


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@needs_native
def test_threads_start_and_end() -> None:
    native.set_threads(1)
    alone = count_threads()
    native.set_threads(4)
    assert count_threads() == alone + 3
    native.set_threads(1)
    assert count_threads() == alone


@needs_native
def test_other_threads_inherit_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    native.set_threads(1)
    before = set(os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, {min(allowed)})
    try:
        native.set_threads(2)
        (made,) = set(os.listdir("/proc/self/task")) - before
        assert os.sched_getaffinity(int(made)) == {min(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)


@needs_native
def test_callers_at_once_get_their_own_results() -> None:
    native.set_threads(3)
    layers = [make_layer() for _ in range(4)]

    def call(layer: PackedLinear, weight: torch.Tensor) -> bool:
        for rows in range(1, 40):
            x = torch.randn(rows, 512)
            if not torch.allclose(
                layer(x), linear_reference(x, weight, None, "float32"), atol=1e-3
            ):
                return False
        return True

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(lambda each: call(*each), layers))


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_tasks_are_counted_within_a_kernel(threads: int) -> None:
    """So often that none of them lasts: 1,024 rows are 4 blocks, 512 outputs 16 panels."""
    native.set_threads(threads)
    layer, _ = make_layer()
    before = native.tasks_done()
    layer(torch.randn(1024, 512))
    assert native.tasks_done() - before == 64


@needs_native
def test_the_gil_is_free_while_a_kernel_runs() -> None:
    """A waiting thread gets its turn inside a call: nothing else here gives the GIL up."""
    layer, _ = make_layer()
    x, out = torch.randn(1024, 512), torch.empty(1024, 512)
    weights, bias = layer._packed.data_ptr(), layer._bias.data_ptr()
    arguments = (x.data_ptr(), 1024, 512, weights, 512, False, bias)
    gate, passed = threading.Lock(), []

    def wait() -> None:
        with gate:
            passed.append(True)

    gate.acquire()
    waiting = threading.Thread(target=wait)
    waiting.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(100.0)  # nobody is made to hand it over
    try:
        gate.release()
        calls = 0
        while not passed and calls < 1000:
            native.kernels.linear_float32(*arguments, out.data_ptr())
            calls += 1
        seen = bool(passed)
    finally:
        sys.setswitchinterval(before)
        waiting.join()
    assert seen


@needs_native
def test_a_child_of_fork_computes_alone() -> None:
    native.set_threads(3)
    layer, weight = make_layer()
    x = torch.randn(5, 512)
    expected = layer(x)
    address, out = x.data_ptr(), torch.zeros(5, 512)
    weights, bias = layer._packed.data_ptr(), layer._bias.data_ptr()
    arguments = (address, 5, 512, weights, 512, False, bias)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            native.kernels.linear_float32(*arguments, out.data_ptr())
            os.write(write, b"1" if torch.equal(out, expected) else b"0")
        finally:
            os._exit(0)
    os.close(write)
    answer = os.read(read, 1)
    os.close(read)
    os.waitpid(child, 0)
    assert answer == b"1"
    assert weight.shape == (512, 512)
