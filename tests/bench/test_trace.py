from __future__ import annotations

import json

import pytest

from bench.trace import CHAT, LONG, QUIET, Pace, Sizes, Writer

SIZES = Sizes(chat_prompt=5, chat_answer=3, long_prompt=40, long_answer=2)
PACE = Pace(rate=4.0, long_every=1.0)


def writer(seed: int = 0) -> Writer:
    return Writer(range(10, 1000), SIZES, seed)


def test_the_same_seed_asks_the_same() -> None:
    first, again, other = (
        writer(seed).steady("loaded", PACE, seconds=3.0, longs=2) for seed in (1, 1, 2)
    )
    assert first == again and first.digest == again.digest
    assert first != other and first.digest != other.digest


def test_a_quiet_phase_is_chats_at_a_steady_rate() -> None:
    quiet = writer().steady(QUIET, PACE, seconds=2.0)
    assert [ask.at for ask in quiet.asks] == [0.25 * number for number in range(1, 9)]
    assert {(ask.kind, len(ask.prompt), ask.answer_tokens) for ask in quiet.asks} == {(CHAT, 5, 3)}


def test_long_prompts_come_in_the_middle_of_their_intervals() -> None:
    loaded = writer().steady("loaded", PACE, seconds=3.0, longs=3)
    longs = [ask for ask in loaded.asks if ask.kind == LONG]
    assert [ask.at for ask in longs] == [0.5, 1.5, 2.5]
    assert {(len(ask.prompt), ask.answer_tokens) for ask in longs} == {(40, 2)}
    assert len(loaded.asks) == 12 + 3
    assert [ask.at for ask in loaded.asks] == sorted(ask.at for ask in loaded.asks)


def test_a_flood_comes_at_once_with_the_long_prompts_first() -> None:
    flood = writer().at_once("flood", chats=3, longs=2)
    assert [ask.kind for ask in flood.asks] == [LONG, LONG, CHAT, CHAT, CHAT]
    assert {ask.at for ask in flood.asks} == {0.0}


def test_no_prompt_comes_twice_in_a_run() -> None:
    one = writer()
    phases = (
        one.steady(QUIET, PACE, seconds=2.0),
        one.steady("loaded", PACE, seconds=2.0, longs=2),
        one.at_once("flood", chats=4, longs=1),
        one.probes(),
    )
    prompts = [ask.prompt for phase in phases for ask in phase.asks]
    assert len(set(prompts)) == len(prompts)


def test_probes_are_of_several_lengths() -> None:
    assert [len(ask.prompt) for ask in writer().probes().asks] == [1, 7, 5, 10]


def test_a_body_fixes_length_and_text() -> None:
    [ask, *_] = writer().probes().asks
    body = json.loads(ask.body("m"))
    assert body["prompt"] == list(ask.prompt) and body["max_tokens"] == ask.answer_tokens
    assert body["temperature"] == 0.0 and body["ignore_eos"] is True
    assert body["model"] == "m" and body["stream"] is True


@pytest.mark.parametrize("seconds", [0.01, 0.3])
def test_a_short_phase_has_a_chat_all_the_same(seconds: float) -> None:
    assert len(writer().steady(QUIET, PACE, seconds=seconds).asks) == 1
