from __future__ import annotations

import json

import pytest

from bench.measured import choose, choose_by_goodput, default_limits, differing, medians
from bench.trace import LOADED, QUIET
from tests.bench.runs import broken, chat, measured, run


def test_numbers_separate_chats_from_long_prompts() -> None:
    one = measured(
        LOADED,
        [chat([10, 20], ttft_ms=5), chat([30, 40], ttft_ms=15), broken()],
        [chat([500], ttft_ms=900)],
        duration=4.0,
    )
    numbers = one.numbers()
    assert numbers["chat_itl_p50_ms"] == pytest.approx(25)
    assert numbers["chat_itl_max_ms"] == pytest.approx(40)  # not the long one's 500
    assert numbers["chat_ttft_p50_ms"] == pytest.approx(10)
    assert numbers["chat_tpot_p50_ms"] == pytest.approx(25)
    assert numbers["long_ttft_p99_ms"] == pytest.approx(900)
    assert (numbers["completed"], numbers["failed"]) == (3, 1)
    assert numbers["request_throughput"] == pytest.approx(3 / 4)
    assert numbers["output_throughput"] == pytest.approx((3 + 3 + 2) / 4)
    assert numbers["drain_s"] == pytest.approx(3.5)


def test_kinds_that_are_not_there_have_no_numbers() -> None:
    numbers = measured(QUIET, [chat([1])]).numbers()
    assert not any(key.startswith("long") for key in numbers)


def test_goodput_counts_chats_that_meet_every_limit() -> None:
    one = measured(
        LOADED,
        [chat([10], ttft_ms=50), chat([30], ttft_ms=50), chat([10], ttft_ms=500), broken()],
        [chat([1], ttft_ms=1)],
        duration=2.0,
    )
    assert one.goodput({"ttft": 100, "tpot": 20}) == pytest.approx(1 / 2)
    assert one.goodput({"tpot": 20}) == pytest.approx(2 / 2)


class TestChoose:
    def test_the_lowest_tail_wins(self) -> None:
        points = [run(chunk=64, loaded_ms=30), run(chunk=128, loaded_ms=20)]
        assert choose(points).chunk == 128

    def test_not_at_the_price_of_the_long_prompts(self) -> None:
        points = [
            run(chunk=16, loaded_ms=10, long_ttft_ms=1001),
            run(chunk=64, loaded_ms=20, long_ttft_ms=1000),
            run(chunk=512, loaded_ms=90, long_ttft_ms=500),
        ]
        assert choose(points).chunk == 64

    def test_not_at_the_price_of_failures(self) -> None:
        points = [run(chunk=64, loaded_ms=10, failures=1), run(chunk=128, loaded_ms=20)]
        assert choose(points).chunk == 128

    def test_where_all_fail_some_the_fewest_failures_count(self) -> None:
        points = [run(chunk=64, loaded_ms=10, failures=2), run(chunk=128, failures=1)]
        assert choose(points).chunk == 128

    def test_by_goodput(self) -> None:
        points = [run(chunk=64, loaded_ms=30), run(chunk=128, loaded_ms=20), run(chunk=256)]
        assert choose_by_goodput(points, {"tpot": 25}).chunk == 128  # the smaller of two equals


def test_medians_over_rounds() -> None:
    rounds = [run(number=n, loaded_ms=ms) for n, ms in ((1, 90), (2, 20), (3, 30))]
    found = medians(rounds, {"tpot": 50})
    assert found[LOADED]["chat_itl_p50_ms"] == pytest.approx(30)
    assert found[LOADED]["goodput"] == pytest.approx(0.5)
    assert found[QUIET]["chat_itl_p50_ms"] == pytest.approx(10)


def test_default_limits_come_from_the_slowest_quiet_mode() -> None:
    rounds = [run("pd", quiet_ms=10.2), run("2xboth", quiet_ms=20), run("1xboth", quiet_ms=8)]
    assert default_limits(rounds) == {"ttft": 50.0, "tpot": 30.0}


def test_differing_answers_are_found_across_modes_and_chunks() -> None:
    same = [run("pd"), run("2xboth", chunk=128)]
    assert differing(same) == {}
    other = run("1xboth", text="a c")
    assert differing([*same, other]) == {"1xboth": 2}  # its probe and its loaded chat
    assert differing([*same, run("1xboth", failures=1)]) == {}  # failed is not different


def test_a_run_as_json_keeps_every_request() -> None:
    found = json.loads(json.dumps(run(failures=1).to_json({"tpot": 50})))
    loaded = found["phases"][LOADED]
    assert (found["mode"], found["chunk"], found["round"]) == ("pd", 64, 1)
    assert loaded["requests"]["kind"] == ["chat", "chat", "long"]
    assert loaded["requests"]["itl_max_ms"] == [20.0, 0.0, 0.0]
    assert loaded["requests"]["error"] == [None, "HTTP 503: busy", None]
    assert loaded["errors"] == {"HTTP 503: busy": 1}
    assert loaded["goodput"] == 0.5
