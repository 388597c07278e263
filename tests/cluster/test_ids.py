from __future__ import annotations

import time

import pytest

from cluster.ids import new_incarnation

MILLISECOND_NS = 10**6
YEAR_2100_NS = (2100 - 1970) * 31_557_600 * 10**9


def test_of_two_starts_the_later_has_the_larger_incarnation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And every one fits the 64 bits that messages and frames have for it."""
    now = time.time_ns()
    incarnations = []
    for start in [*range(now, now + 50 * MILLISECOND_NS, MILLISECOND_NS), YEAR_2100_NS]:
        monkeypatch.setattr(time, "time_ns", lambda start=start: start)
        incarnations.append(new_incarnation())
    assert incarnations == sorted(set(incarnations))
    assert incarnations[-1] < 2**64
