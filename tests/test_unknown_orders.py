"""Orders for requests that a worker does not know leave nothing behind (FAULTS 4, G12).

That older attempts change nothing is in tests/decode/test_stage.py and tests/prefill/test_stage.py.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import pytest

from cluster.messages import Cancel, Failed, Start
from tests.decode.test_stage import Room as DecodeRoom
from tests.prefill.test_stage import Room as PrefillRoom

MANY = 2000


def sizes(*owners: object) -> dict[tuple[str, str], int]:
    """Of everything these hold that can grow."""
    return {
        (type(owner).__name__, name): len(value)
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, Sized)
    }


@pytest.mark.parametrize("kind", [PrefillRoom, DecodeRoom])
def test_unknown_requests_grow_nothing(kind: type[Any]) -> None:
    room = kind()
    owners = [room.stage, room.pool, *([room.landings] if kind is DecodeRoom else [])]
    before, free = sizes(*owners), room.pool.counts()
    for number in range(MANY):
        room.tell(Cancel(f"unknown-{number}", number), Start(f"unknown-{number}", 5, 1))
    said = [event for _, event in room.stage.mail()]
    assert len(said) == MANY
    assert all(isinstance(event, Failed) for event in said), "each Start is answered, by a refusal"
    assert sizes(*owners) == before
    assert room.pool.counts() == free
