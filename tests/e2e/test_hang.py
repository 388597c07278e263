"""Workers that hang, are stopped, or whose device fails: streams go on elsewhere, and they come
back (FAULTS 3.3, rows 3, 4 and 24)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest

from tests.e2e.client import DONE, stream
from tests.e2e.cluster import at_rest, wait_until
from tests.e2e.launched import House, launched
from tests.e2e.test_cancel import COMPLETIONS, LONG_ANSWER

BODY = {**LONG_ANSWER, "max_tokens": 2500, "return_token_ids": True}

STOP_S = 3.0
"""Beyond what gateways wait for, and short of the HANG_S of the workers here."""

HANG_S = 8.0

MOVED_S = 10.0
"""We promise that silence is noticed within 1.5 s and a hung step loop within 3 s; the rest is for
the way of the prompt through a machine that runs other tests."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("house")
    with launched(
        directory, "--prefill", "1", "--decode", "2", f"--hang-timeout={HANG_S}"
    ) as house:
        yield house


@pytest.fixture(scope="module")
def undisturbed(house: House) -> list[int]:
    with stream(house.url, COMPLETIONS, BODY) as events:
        return token_ids(events)


def token_ids(events: Iterable[Any]) -> list[int]:
    """Of a stream, which must come to its end."""
    *chunks, end = events
    assert end == DONE, chunks[-1]
    return [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]


@contextmanager
def streaming(house: House) -> Iterator[tuple[str, Iterable[Any]]]:
    """The only request, of which a token has come, and the decode worker that has it."""

    def at_work() -> list[str]:
        return [w["name"] for w in house.status()["workers"] if not at_rest(w)]

    wait_until(lambda: not at_work(), "what was before to be told")
    with stream(house.url, COMPLETIONS, BODY) as events:
        first = next(events)
        wait_until(lambda: [name[:-1] for name in at_work()] == ["decode-"], "one to decode")
        [name] = at_work()
        yield name, chain([first], events)


@pytest.mark.parametrize(
    ("fault", "cause", "status", "trace"),
    [
        pytest.param("sleep", "hung", 1, "in _sleep", id="hangs"),
        pytest.param("regex", "silent", 1, "in _regex", id="hangs with the GIL"),
        pytest.param("device", "died", 70, "AcceleratorError", id="loses its device"),
    ],
)
def test_a_worker_that_computes_no_more(
    house: House, undisturbed: list[int], fault: str, cause: str, status: int, trace: str
) -> None:
    """Its stream goes on elsewhere, it ends with a word on why, and is there again."""
    before, recovered = house.workers(), house.recoveries()
    with streaming(house) as (name, events):
        house.fail(name, fault)
        since = time.monotonic()
        wait_until(lambda: house.recoveries() != recovered, "recovered", MOVED_S)
        print(f"{fault}: noticed after {time.monotonic() - since:.2f} s")
        assert token_ids(events) == undisturbed
    assert house.recoveries() == {**recovered, cause: recovered.get(cause, 0) + 1}
    house.until_replaced(name, before[name])
    assert f"{name} ended with status {status}" in house.launcher.stderr
    assert trace in house.launcher.stderr


def test_a_short_stop_moves_nothing(house: House, undisturbed: list[int]) -> None:
    before, recovered = house.workers(), house.recoveries()
    with streaming(house) as (name, events):
        pid = house.pid(name)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.4)  # what is tested
        os.kill(pid, signal.SIGCONT)
        assert token_ids(events) == undisturbed
    assert house.recoveries() == recovered and house.workers() == before


def test_a_worker_back_from_a_long_stop(house: House, undisturbed: list[int]) -> None:
    """Its stream has moved; it frees everything and is the same worker as before."""
    before, recovered = house.workers(), house.recoveries()
    with streaming(house) as (name, events):
        pid = house.pid(name)
        os.kill(pid, signal.SIGSTOP)
        since = time.monotonic()
        wait_until(lambda: house.recoveries() != recovered, "recovered", MOVED_S)
        print(f"stop: noticed after {time.monotonic() - since:.2f} s")
        time.sleep(max(0.0, since + STOP_S - time.monotonic()))
        os.kill(pid, signal.SIGCONT)
        assert token_ids(events) == undisturbed
    wait_until(lambda: house.workers() == before, "the same worker again")
    wait_until(lambda: all(map(at_rest, house.status()["workers"])), "every block given back")
