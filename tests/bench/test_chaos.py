"""`baton chaos`: that its checker sees what it is there for. The rounds are in tests/chaos."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bench.chaos import main as chaos
from bench.chaos.asks import COMPLETIONS, Ask, write
from bench.chaos.book import DIFFERENT, EQUAL, Entry, dealt, record
from bench.chaos.heard import CUT, Choice, Heard, Said, call
from bench.chaos.house import held
from bench.chaos.options import FULL, parse_options
from bench.chaos.report import Report, quantiles
from bench.chaos.scene import TWO_KILLED, Blow, Round, Scene, grown
from bench.chaos.traffic import Run, Traffic
from cluster.errors import StartError
from tests.bench.conftest import CUT as DROPPED
from tests.bench.conftest import DONE, chunk, event, usage, whole

ASK = Ask("greedy", COMPLETIONS, {"model": "m", "prompt": "p", "stream": True})


def said(text: str = "abc", tokens: tuple[int, ...] = (1, 2, 3), **fields: Any) -> Said:
    choice = Choice(text, list(tokens), [-0.5] * len(tokens), "length")
    for name, value in fields.items():
        setattr(choice, name, value)
    return Said({0: choice}, (5, len(tokens)))


def heard(its: Said, error: str = "", times: tuple[float, ...] = (0.0, 1.0)) -> Heard:
    return Heard(ASK, "g", its, list(times), error)


ENTRY = Entry(ASK, said(), 0.1, 3)


def test_an_answer_that_says_the_same_is_equal() -> None:
    assert ENTRY.verdict(heard(said())) == EQUAL
    close = said(logprobs=[-0.5004, -0.5, -0.5])
    assert ENTRY.verdict(heard(close)) == EQUAL, "the last bits of KV may differ"


@pytest.mark.parametrize(
    "wrong",
    [
        said(text="abd"),
        said(text="abcc"),
        said(tokens=(1, 2, 4)),
        said(tokens=(1, 2, 2, 3)),
        said(tokens=(1, 3)),
        said(finish="stop"),
        said(stop_reason="c"),
        said(logprobs=[-0.5, -0.6, -0.5]),
        said(logprobs=[-0.5, -0.5]),
        Said(said().choices, (5, 4)),
        Said(said().choices, None),
        Said({0: said().choices[0], 1: Choice()}, (5, 3)),
        Said({}, (5, 3)),
    ],
)
def test_an_answer_that_says_anything_else_is_different(wrong: Said) -> None:
    assert ENTRY.verdict(heard(wrong)) == DIFFERENT


def test_an_error_excuses_only_what_was_not_said() -> None:
    assert ENTRY.verdict(heard(said("ab", (1, 2)), "worker_lost")) == "worker_lost"
    assert ENTRY.verdict(heard(Said(), "no_workers")) == "no_workers"
    assert ENTRY.verdict(heard(said("ax", (1, 2)), "worker_lost")) == DIFFERENT
    assert ENTRY.verdict(heard(said("ab", (1, 9)), "worker_lost")) == DIFFERENT


async def hear(url: str, ask: Ask = ASK) -> Heard:
    its = Heard(ask, url)
    async with aiohttp.ClientSession() as session:
        await call(session, url, its)
    return its


async def test_a_stream_is_heard_to_its_end(serve_script: Callable[..., Any]) -> None:
    metrics = {"recoveries": [{"phase": "decoding", "cause": "died", "pause_ms": 40.0}]}
    script = [chunk("a"), chunk("b", "length"), usage(3, 2, metrics=metrics), DONE]
    its = await hear((await serve_script(script)).url)
    assert its.error == "" and its.said.choices[0].text == "ab" and its.said.usage == (3, 2)
    assert its.recoveries == metrics["recoveries"]
    assert len(its.times) == 2 + len(script)


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ([event({"error": {"code": "worker_lost"}})], "worker_lost"),
        ([DROPPED], CUT),
        ([], CUT),  # an end in good order, as far as HTTP knows
        ([chunk("", "length")], CUT),
    ],
)
async def test_a_stream_without_its_end(
    serve_script: Callable[..., Any], end: list[Any], error: str
) -> None:
    its = await hear((await serve_script([chunk("a"), *end])).url)
    assert its.error == error and its.said.choices[0].text == "a"


async def test_nobody_there() -> None:
    assert (await hear("http://127.0.0.1:1")).error == CUT


async def test_an_answer_ended_by_a_string_of_its_own(serve_script: Callable[..., Any]) -> None:
    """Of the third ask the text is known by then."""
    server = await serve_script(whole("once ", "upon ", "a time"))
    async with aiohttp.ClientSession() as session:
        entries = await record(session, server.url, [ASK] * 3)
    assert [entry.ask.body.get("stop") for entry in entries] == [None, None, ["n a "]]
    assert [entry.events for entry in entries] == [5] * 3


async def test_an_undisturbed_answer_must_not_fail(serve_script: Callable[..., Any]) -> None:
    server = await serve_script([chunk("a"), DROPPED])
    async with aiohttp.ClientSession() as session:
        with pytest.raises(StartError, match="greedy"):
            await record(session, server.url, [ASK])


async def test_traffic_hears_every_answer_and_names_moments(
    serve_script: Callable[..., Any],
) -> None:
    server = await serve_script(whole("a", "b"))
    async with aiohttp.ClientSession() as session:
        entries = await record(session, server.url, [ASK] * 2)
        traffic = Traffic(session, [server.url], entries, random.Random(1), width=3)
        moments = 0
        async with traffic.flowing(20):
            while await traffic.moment():
                moments += 1
    assert len(traffic.runs) == 20 and 1 <= moments <= 20
    assert traffic.verdicts == Counter({EQUAL: 20}) and traffic.live == []
    assert server.most_open <= 3


def test_all_asks_come_up_alike() -> None:
    entries = [Entry(Ask(str(n), COMPLETIONS, {}), Said(), 0, 0) for n in range(5)]
    names = Counter(entry.ask.name for entry in dealt(entries, 13, random.Random(2)))
    assert sorted(names.values()) == [2, 2, 3, 3, 3]


def test_the_asks_cover_what_a_recovery_could_break() -> None:
    bodies = [ask.body for ask in write("m", range(100), 4096, seed=3)]
    fields = {name for body in bodies for name, value in body.items() if value}
    assert {"logprobs", "n", "presence_penalty", "logit_bias", "top_k", "messages"} <= fields
    assert {body["stream"] for body in bodies} == {True, False}
    assert {bool(body["temperature"]) for body in bodies} == {True, False}
    assert write("m", range(100), 4096, seed=3) == write("m", range(100), 4096, seed=3)


def struck(*runs: Run) -> Round:
    blows = [Blow("kill -9", "decode-0", "decode", "1", at, gone_s=0.05) for at in (1.0, 1.2)]
    return Round("kill", list(runs), blows)


def test_only_excused_errors_keep_a_promise() -> None:
    lost = Run(ENTRY, heard(Said(), TWO_KILLED, (0.5, 2.0)))
    wrong = Run(ENTRY, heard(said("abd"), times=(0.5, 2.0)))
    found = struck(lost, wrong, Run(ENTRY, heard(said(), times=(5.0, 6.0))))
    assert [found.blows_at(run) for run in found.runs] == [2, 2, 0]
    found.judge(lambda run: True)
    [line] = found.wrong
    assert DIFFERENT in line and "decode-0" in line
    strict = struck(lost)
    strict.judge()
    assert len(strict.wrong) == 1


def test_pauses_are_those_of_answers_that_moved() -> None:
    still = Run(ENTRY, heard(said(), times=(0.0, 0.9, 4.0)))
    moved = deepcopy(still)
    moved.heard.metrics = {"recoveries": [{"phase": "decoding", "cause": "died"}]}
    found = struck(still, moved)
    found.feel()
    assert [blow.pauses for blow in found.blows] == [[pytest.approx(3.1)]] * 2


def test_a_counter_that_begins_anew() -> None:
    before = Counter({("g0", "decoding", "died"): 5, ("g1", "decoding", "died"): 7})
    after = Counter({("g0", "decoding", "died"): 6, ("g1", "decoding", "died"): 2})
    assert grown(before, after) == Counter({("decoding", "died"): 3})


def test_what_a_worker_holds() -> None:
    states = {f"{name}_blocks": 0 for name in ("free", "cached", "promised", "owned")}
    counts = dict.fromkeys(("requests", "running", "waiting", "queued_tokens"), 0)
    worker = {"name": "w", "blocks": 8, **states, **counts, "free_blocks": 6, "cached_blocks": 2}
    assert held(worker) == []
    assert held({**worker, "cached_blocks": 1, "owned_blocks": 1}) == ["w: owned_blocks 1"]
    [line] = held({**worker, "free_blocks": 5})
    assert "add up" in line
    assert held({**worker, "running": 1}) == ["w: running 1"]


class _StillHouse:
    """Where nothing is counted and nothing left."""

    async def counter(self, *names: str) -> Counter[tuple[str, ...]]:
        return Counter()

    async def left_over(self, seconds: float) -> list[str]:
        return []


async def test_a_wait_in_vain_ends_the_round_and_is_told() -> None:
    house: Any = _StillHouse()
    async with aiohttp.ClientSession() as session:
        scene = Scene(house, session, [ENTRY], random.Random(0), longest=64, width=1)
        async with scene.round("kill") as found:
            found.runs.append(Run(ENTRY, Heard(ASK, "g")))  # was never sent
            async with asyncio.TaskGroup():
                raise TimeoutError("waited in vain for decode-0")
    assert found.stuck and found.wrong == ["waited in vain for decode-0"]
    found.judge()
    assert len(found.wrong) == 1


def test_quantiles_are_values_that_were_measured() -> None:
    assert quantiles([]) == {"count": 0}
    assert quantiles(range(1, 101)) == {"count": 100, "p50": 50, "p99": 99, "max": 100}


def reported(*rounds: Round, own_errors: tuple[str, ...] = ()) -> Report:
    return Report(parse_options([]), 12, rounds, own_errors)


def test_the_report_says_what_was_broken() -> None:
    fine = reported(struck(Run(ENTRY, heard(said()))))
    assert fine.wrong == [] and "broken promises: 0" in fine.table()
    broken = struck()
    broken.require(False, "a block was left")
    broken.recoveries = Counter({("decoding", "died"): 4})
    report = reported(broken, own_errors=("gateway-0: Traceback",))
    table, data = report.table(), json.loads(json.dumps(report.to_json()))
    assert len(report.wrong) == 2 == len(data["broken_promises"])
    assert "kill: a block was left" in table
    assert "recovered while decoding, because died: 4" in table
    assert data["rounds"][0]["recoveries"] == {"decoding / died": 4}
    assert data["seconds"]["kill: kill -9, decode"]["noticed"]["p50"] == 0.05


@pytest.mark.parametrize("broken", [False, True])
def test_the_exit_status(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = struck()
    found.require(not broken, "a block was left")

    async def run(options: Any) -> Report:
        return Report(options, 12, [found], [])

    monkeypatch.setattr(chaos, "run", run)
    output = tmp_path / "new" / "chaos.json"
    assert chaos.main(["--output", str(output)]) == int(broken)
    assert json.loads(output.read_text())["seed"] == 0
    assert f"broken promises: {int(broken)}" in capsys.readouterr().out


def test_flags() -> None:
    short, full = parse_options([]), parse_options(["--full", "--drains", "2", "--rounds", "stop"])
    assert short.counts.streams == 40 and full.counts.streams == FULL.streams == 1000
    assert full.counts.drains == 2 and full.rounds == ("stop",)
    for wrong in (["--decode", "1"], ["--width", "0"], ["--streams", "-1"]):
        with pytest.raises(StartError):
            parse_options(wrong)
