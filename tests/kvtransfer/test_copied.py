from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

from engine import native
from kvtransfer.shared_memory import Copies, copied

SIZES = (0, 1, 240, 241, 1023, 1024, 1025, 1087, 1088, 1089, 2048, 5000, (1 << 20) + 17)


@pytest.fixture(params=[*native.isas(), ""])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each instruction set in turn, and none of them."""
    best = native.isa()
    if request.param:
        native.use(request.param)
    else:
        monkeypatch.setattr(native, "available", lambda: False)
    yield
    if best:
        native.use(best)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_a_copy_and_the_digest_of_the_wire(size: int, offset: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, offset + size, dtype=np.uint8)[offset:]
    memory = np.zeros(size + 128, dtype=np.uint8)
    target = memory[64 : 64 + size]
    assert copied(source, target) == xxhash.xxh3_64_intdigest(source.tobytes())
    assert target.tobytes() == source.tobytes()
    assert not memory[:64].any() and not memory[64 + size :].any()


def test_memory_is_used_again_once_nobody_holds_the_copy() -> None:
    copies, source = Copies(copied), np.ones(1000, dtype=np.uint8)
    held = copies.of(source)
    other = copies.of(source)
    where = other.ctypes.data
    assert where != held.ctypes.data
    del other
    assert copies.of(source).ctypes.data == where
    assert held.digest == copied(source, np.empty_like(source))
