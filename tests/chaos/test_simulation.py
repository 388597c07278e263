"""The simulation in CI: two hundred lives, one fault at many messages, and a checker that can fail.

The long form: `python -m tests.chaos.simulation --seeds 0:10000 --jobs 2`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos import mutants
from tests.chaos.faults import Blow
from tests.chaos.history import FINISHED
from tests.chaos.life import Tally, live
from tests.chaos.mutants import Patch
from tests.chaos.scenario import CALM, ROUGH, Scenario, crowded, draw, small
from tests.chaos.simulation import campaign, main, report, systematic

SEEDS = 200
SHARE = 20
TRIES = 30
"""Seeds within which a mutant must be found; most are by the first three."""


@pytest.mark.parametrize("first", range(0, SEEDS, SHARE))
def test_whatever_happens_every_invariant_holds(first: int) -> None:
    tally = Tally()
    for seed in range(first, first + SHARE):
        tally.add(live(draw(seed)))
    assert not tally.failed, report(tally)
    finished = sum(tally.ends[end] for end in FINISHED)
    assert finished > 0.7 * tally.ends.total(), report(tally)
    assert tally.recoveries and tally.faults


def test_two_processes_share_a_campaign_and_tell_the_same() -> None:
    alone, shared = campaign(range(4), jobs=1), campaign(range(4), jobs=2)
    assert shared.lives == 4
    assert (shared.messages, shared.ends) == (alone.messages, alone.ends)
    assert sorted(shared.pauses) == sorted(alone.pauses)


def test_one_fault_at_many_messages_fails_nobody() -> None:
    tally = systematic(seed=0, every=23)
    assert not tally.failed, report(tally)
    assert tally.recoveries
    assert set(tally.ends) <= {*FINISHED, "gateway died", "unreachable"}


def test_the_same_seed_is_the_same_life() -> None:
    """In whatever process: a failing seed can be run again. Only landing ids are random."""
    script = (
        "import re; from tests.chaos.life import Life; from tests.chaos.scenario import draw; "
        "life = Life(draw(26), verbose=True); life.live(); "
        "print(re.sub('[0-9a-f]{32}', 'id', chr(10).join(life.faults.log)))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": salt},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for salt in ("1", "2")
    ]
    assert said[0].count("\n") > 100
    assert said[0] == said[1]


def _one(kind: str) -> Callable[[int], Scenario]:
    """One fault of that kind, a little later with each seed."""
    return lambda seed: small(seed, blows=(Blow(20 + 7 * seed, kind),))


def _rain(**rates: float) -> Callable[[int], Scenario]:
    """Faults of these kinds again and again."""
    return lambda seed: small(seed, ROUGH, rates=rates)


def _calm(seed: int) -> Scenario:
    return small(seed, CALM)


def _tenants(seed: int) -> Scenario:
    return draw(10 * seed)


def _repeated(seed: int) -> Scenario:
    return crowded(seed, credit=1 << 16, rates={"frame_repeated": 0.5})


def _leaving(seed: int) -> Scenario:
    """Every other client leaves, one after the other."""
    scenario = crowded(seed)
    clients = tuple(
        replace(client, gives_up=0.07 * number if number % 2 else None)
        for number, client in enumerate(scenario.clients)
    )
    return replace(scenario, clients=clients)


@pytest.mark.parametrize(
    ("mutant", "scenario"),
    [
        (mutants.a_damaged_body_is_taken_for_whole, _rain(frame_flipped=0.3)),
        (mutants.a_landing_is_started_before_it_is_sealed, _rain(frame_late=0.3)),
        (mutants.blocks_are_freed_while_they_are_sent, crowded),
        (mutants.late_chunks_are_written_into_freed_blocks, _repeated),
        (mutants.a_block_is_published_before_it_is_full, _leaving),
        (mutants.tenants_share_their_prefixes, _tenants),
        (mutants.a_token_said_twice_is_taken_twice, _rain(order_repeated=0.3)),
        (mutants.a_resumed_request_forgets_a_token, _one("crash")),
        (mutants.a_resumed_request_counts_from_one_too_many, _one("crash")),
        (mutants.nothing_is_tried_again, _one("crash")),
        (mutants.attempts_are_without_end, _rain(frame_cut=0.5)),
        (mutants.a_request_may_kill_any_number_of_workers, _rain(crash=0.05)),
        (mutants.a_hung_step_loop_goes_unnoticed, _one("hang")),
        (mutants.a_stall_is_taken_for_death, _one("stall")),
        (mutants.leases_are_never_swept, _rain(order_repeated=0.3)),
        (mutants.handoffs_never_end, _rain(frame_lost=0.1)),
        (mutants.cancels_get_lost, _calm),
        (mutants.ended_requests_keep_their_mailboxes, _calm),
        (mutants.a_zombie_evicts_its_successor, _one("replace")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_checker_finds(
    mutant: Callable[[Patch], None], scenario: Callable[[int], Scenario], monkeypatch: Patch
) -> None:
    for seed in range(TRIES):
        with monkeypatch.context() as patch:
            mutant(patch)
            found = live(scenario(seed)).failed
        if found:
            assert not live(scenario(seed)).failed, "and without the mutant too"
            return
    pytest.fail(f"{mutant.__name__} lives")


def test_a_failing_seed_prints_itself_and_how_to_run_it_again(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    mutants.ended_requests_keep_their_mailboxes(monkeypatch)
    assert main(["--seeds", "0:2"]) == 1
    assert "python -m tests.chaos.simulation --seed 1 -v" in capsys.readouterr().out
    assert main(["--seed", "1", "-v"]) == 1
    said = capsys.readouterr().out
    assert "Prefill(" in said and "I7" in said
