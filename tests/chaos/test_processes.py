"""Real processes struck while they answer: the short form of `baton chaos`, one test a round.

Its other rounds, a gateway killed and no worker of a role left, are tests of their own in e2e/.
"""

from __future__ import annotations

import asyncio

import pytest

from bench.chaos import busy, cancel, rounds
from bench.chaos.book import EQUAL
from bench.chaos.house import Plan
from bench.chaos.main import staged
from bench.chaos.options import ChaosOptions, Counts
from bench.chaos.scene import Round

pytestmark = pytest.mark.timeout(300)

ROUNDS = ("kill", "stop", "drain", "cancel", "busy")

Found = tuple[dict[str, Round], list[str]]


async def play() -> Found:
    options = ChaosOptions(
        plan=Plan(prefill=2, decode=2, gateways=1), counts=Counts(asks=6), width=4
    )
    async with staged(options) as scene:
        found = [
            await rounds.kill(scene, streams=16),
            await rounds.stop(scene, short=1, long=1),
            await rounds.drain(scene, ["prefill-0", "decode-0"]),
            await cancel.cancel(scene, count=60),
            await busy.busy(scene, seconds=3),
        ]
        return {one.name: one for one in found}, scene.house.own_errors()


@pytest.fixture(scope="module")
def played() -> Found:
    """One cluster for all rounds: starting it costs more than most of them."""
    return asyncio.run(play())


@pytest.fixture
def found(played: Found, request: pytest.FixtureRequest) -> Round:
    return played[0][request.param]


@pytest.mark.parametrize("found", ROUNDS, indirect=True)
def test_every_promise_is_kept(found: Round) -> None:
    """Every answer equal to its undisturbed text and usage, no block left, nobody lost for good."""
    assert found.wrong == []
    assert found.verdicts[EQUAL] > 0


@pytest.mark.parametrize("found", ["kill", "stop", "drain"], indirect=True)
def test_there_was_something_to_keep_it_against(found: Round) -> None:
    assert found.blows
    assert any(found.blows_at(run) for run in found.runs)


def test_no_process_logged_a_failure_of_its_own(played: Found) -> None:
    """What no client saw counts too."""
    assert played[1] == []
