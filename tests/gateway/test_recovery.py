from __future__ import annotations

import pytest

from cluster.errors import (
    BadRequest,
    BatonError,
    EngineFailed,
    NoWorkers,
    Overloaded,
    TokenLost,
    TransferFailed,
    WorkerLost,
)
from gateway.recovery import GivenBack, Losses

DIED, SILENT = WorkerLost("gone"), WorkerLost("gone", cause="silent")
BROKEN, GAP, ENGINE = TransferFailed("cut"), TokenLost("gap"), EngineFailed("raised")


@pytest.mark.parametrize(
    "error", [BadRequest("x"), NoWorkers("x"), Overloaded("x"), BatonError("x")]
)
def test_what_another_attempt_would_not_mend_ends_it(error: BatonError) -> None:
    with pytest.raises(type(error)) as raised:
        Losses().count(error)
    assert raised.value is error


@pytest.mark.parametrize(
    ("errors", "causes", "end"),
    [
        ([SILENT, BROKEN, SILENT], ["silent", "transfer"], WorkerLost),
        ([BROKEN, GAP, BROKEN], ["transfer", "gap"], TransferFailed),
        ([DIED, SILENT, GAP], ["died", "silent"], TokenLost),
        ([DIED, DIED], ["died"], EngineFailed),
        ([ENGINE, WorkerLost("x", cause="hung")], ["engine"], EngineFailed),
        ([SILENT, ENGINE, DIED], ["silent", "engine"], EngineFailed),
        ([SILENT, GAP, ENGINE], ["silent", "gap"], WorkerLost),
    ],
)
def test_three_attempts_and_two_deaths(
    errors: list[BatonError], causes: list[str], end: type[BatonError]
) -> None:
    losses = Losses()
    assert not losses
    assert [losses.count(error) for error in errors[:-1]] == causes
    assert losses
    with pytest.raises(end) as raised:
        losses.count(errors[-1])
    told = raised.value
    assert type(told) is end
    if told.retry:
        assert (told.http, told.grpc) == (503, "UNAVAILABLE")
    else:
        assert (told.http, told.code) == (500, "engine_error"), (
            "of who killed two, and only of them"
        )


def test_who_had_nothing_computed_killed_nobody() -> None:
    losses = Losses()
    assert losses.count(DIED, computing=False) == "died" and not losses.suspect
    assert losses.count(DIED) == "died" and losses.suspect
    with pytest.raises(WorkerLost):  # the third attempt, not the second death
        losses.count(DIED, computing=False)


def test_being_given_back_is_no_loss() -> None:
    losses = Losses()
    assert {losses.count(GivenBack("drains")) for _ in range(10)} == {"drained"}
    assert not losses
