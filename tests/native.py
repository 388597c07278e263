"""Marks for tests of the C++ kernels, which a machine without a compiler does not have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine import native

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not() or "built")


@pytest.fixture(
    params=[(isa, threads) for isa in native.isas() for threads in (1, 3)], autouse=True
)
def every_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """In a module that imports it each test runs on each instruction set, on 1 and 3 threads."""
    isa, threads = request.param
    native.use(isa)
    native.set_threads(threads)
    yield
    native.set_threads(1)
    native.use(native.isas()[0])
