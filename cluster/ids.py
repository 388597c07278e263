"""Ids are made by us, so that a client can never name anything of ours (R7)."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from typing import Final

_LABEL: Final = re.compile(rb"[\x21-\x7e]{1,128}")


def new_id() -> str:
    """A request or landing id: 128 random bits as 32 hex digits."""
    return secrets.token_hex(16)


def new_incarnation() -> int:
    """Tells one start of a process from the next under the same name, which is the larger number.

    Milliseconds of the wall clock, then 22 random bits: 64 bits until the year 2109.
    """
    return time.time_ns() // 1_000_000 << 22 | secrets.randbits(22)


def label(given: Sequence[bytes]) -> str:
    """What a client calls its request if that is one plain word, else an id of ours. Only logs and
    headers show it."""
    if len(given) == 1 and _LABEL.fullmatch(given[0]):
        return given[0].decode("ascii")
    return new_id()
