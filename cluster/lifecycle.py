"""Every legal change of a request's phase and of a landing's state, in two literal tables.

An illegal change is a bug of ours and raises at the place that made it.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class Phase(Enum):
    """Where the gateway's truth about one request stands."""

    QUEUED = "queued"
    PROMISING = "promising"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class LandingState(Enum):
    """Where a promised set of blocks stands on its decode worker."""

    PROMISED = "promised"
    SEALED = "sealed"
    STARTED = "started"  # its blocks belong to a running sequence
    RELEASED = "released"  # cancelled, expired or failed


_ENDS: Final = {Phase.FAILED, Phase.CANCELLED}

NEXT_PHASE: Final[dict[Phase, set[Phase]]] = {
    Phase.QUEUED: {Phase.PROMISING, Phase.PREFILLING, *_ENDS},  # no landing for one token or `both`
    Phase.PROMISING: {Phase.PREFILLING, Phase.QUEUED, *_ENDS},  # QUEUED: refused, or lost
    Phase.PREFILLING: {Phase.HANDING_OFF, Phase.DECODING, Phase.DONE, Phase.QUEUED, *_ENDS},
    Phase.HANDING_OFF: {Phase.DECODING, Phase.QUEUED, *_ENDS},  # QUEUED: a worker was lost
    Phase.DECODING: {Phase.DONE, Phase.QUEUED, *_ENDS},
    Phase.DONE: set(),
    Phase.FAILED: set(),
    Phase.CANCELLED: set(),
}

NEXT_LANDING: Final[dict[LandingState, set[LandingState]]] = {
    LandingState.PROMISED: {LandingState.SEALED, LandingState.RELEASED},
    LandingState.SEALED: {LandingState.STARTED, LandingState.RELEASED},
    LandingState.STARTED: set(),
    LandingState.RELEASED: set(),
}


def advance(now: Phase, then: Phase) -> Phase:
    """Raises AssertionError on a change that the table does not hold."""
    assert then in NEXT_PHASE[now], f"illegal phase change {now.value} -> {then.value}"
    return then


def advance_landing(now: LandingState, then: LandingState) -> LandingState:
    """Raises AssertionError on a change that the table does not hold."""
    assert then in NEXT_LANDING[now], f"illegal landing change {now.value} -> {then.value}"
    return then
