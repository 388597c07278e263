from __future__ import annotations

from itertools import pairwise

import pytest

from cluster.lifecycle import (
    NEXT_LANDING,
    NEXT_PHASE,
    LandingState,
    Phase,
    advance,
    advance_landing,
)

ENDS = [Phase.DONE, Phase.FAILED, Phase.CANCELLED]

WAYS = {
    "a pair": "QUEUED PROMISING PREFILLING HANDING_OFF DECODING DONE",
    "one token": "QUEUED PREFILLING DONE",
    "undivided": "QUEUED PREFILLING DECODING DONE",
    "refused a landing": "QUEUED PROMISING QUEUED PROMISING",
    "refused a prefill": "QUEUED PROMISING PREFILLING QUEUED",
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_ways_a_request_goes(way: str) -> None:
    for now, then in pairwise(Phase[name] for name in way.split()):
        assert advance(now, then) is then


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in ENDS])
@pytest.mark.parametrize("end", [Phase.FAILED, Phase.CANCELLED])
def test_any_phase_may_fail_or_be_cancelled(phase: Phase, end: Phase) -> None:
    assert advance(phase, end) is end


@pytest.mark.parametrize("end", ENDS)
def test_nothing_follows_an_end(end: Phase) -> None:
    for phase in Phase:
        with pytest.raises(AssertionError, match=f"{end.value} -> {phase.value}"):
            advance(end, phase)


def test_no_token_is_decoded_before_a_prefill() -> None:
    for phase in (Phase.QUEUED, Phase.PROMISING):
        with pytest.raises(AssertionError):
            advance(phase, Phase.DECODING)


def test_only_a_sealed_landing_is_started_and_only_once() -> None:
    assert advance_landing(LandingState.PROMISED, LandingState.SEALED)
    assert advance_landing(LandingState.SEALED, LandingState.STARTED)
    for now in (LandingState.PROMISED, LandingState.STARTED, LandingState.RELEASED):
        with pytest.raises(AssertionError, match=f"{now.value} -> started"):
            advance_landing(now, LandingState.STARTED)


def test_a_landing_is_released_once_and_not_from_under_a_sequence() -> None:
    for now in LandingState:
        released = LandingState.RELEASED
        assert (released in NEXT_LANDING[now]) == (
            now in (LandingState.PROMISED, LandingState.SEALED)
        )


def test_the_tables_know_every_state() -> None:
    assert set(NEXT_PHASE) == set(Phase)
    assert set(NEXT_LANDING) == set(LandingState)
