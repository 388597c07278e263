from __future__ import annotations

import pytest

from gateway.pace import BUSY_TOKENS, MEASURED_S, UNMEASURED_TOKENS, WINDOW_S, Pace, Reading


def test_a_pace_is_not_told_before_enough_was_seen() -> None:
    pace = Pace()
    assert pace.rate == 0
    pace.add(100, MEASURED_S / 2)
    assert pace.rate == 0
    pace.add(200, MEASURED_S)
    assert pace.rate == pytest.approx(200 / MEASURED_S, rel=0.05)


def test_a_pace_follows_what_changes_and_does_not_jump() -> None:
    pace = Pace()
    for _ in range(100):
        pace.add(100, 0.1)
    pace.add(10, 0.1)
    assert 900 < pace.rate < 1000
    for _ in range(250):
        pace.add(10, 0.1)
    assert pace.rate == pytest.approx(100, rel=0.1)


def read(reading: Reading, tokens: int, begin: float, end: float, cached: int = 0) -> None:
    reading.add("r", tokens, begin)
    reading.done("r", cached, end)


def test_a_worker_is_measured_while_it_has_enough_to_do() -> None:
    reading = Reading()
    for second in range(5):
        read(reading, 1000, second, second + 0.5)
    assert reading.rate == pytest.approx(2000)
    for second in range(5, 50):  # steps that cost more than the token in them
        read(reading, 1, second, second + 0.1)
    assert reading.rate == pytest.approx(2000)


def test_what_a_cache_held_was_served_and_not_computed() -> None:
    reading = Reading()
    read(reading, 1000, 0.0, 1.0, cached=900)
    assert (reading.rate, reading.speed) == pytest.approx((1000, 100))


def test_prompts_that_end_together_count_together() -> None:
    reading = Reading()
    for number in range(20):
        reading.add(f"{number}", 50, 0.0)
    for number in range(20):
        reading.done(f"{number}", 0, 1.0)
    assert reading.rate == pytest.approx(1000)


def test_what_others_ask_of_a_worker_shows_as_less_for_us() -> None:
    reading = Reading()
    for number in range(10):
        reading.add(f"{number}", 100, 0.0)
    for number in range(10):
        reading.done(f"{number}", 0, number + 1.0)
    assert reading.rate == pytest.approx(100)


def test_time_that_ends_in_nothing_is_no_measurement() -> None:
    reading = Reading()
    reading.add("a", 1000, 0.0)
    reading.drop("a")
    reading.done("a", 0, 100.0)
    assert reading.rate == 0
    read(reading, 1000, 100.0, 101.0)
    assert reading.rate == pytest.approx(1000)
    reading.drop("a")
    assert reading.takes(10**9)


def test_the_window_is_half_a_second_of_its_own_speed() -> None:
    reading = Reading()
    for second in range(5):
        read(reading, 2000, second, second + 1)
    given = 0
    while reading.takes(100):
        reading.add(f"{given}", 100, 5.0)
        given += 100
    assert given == 2000 * WINDOW_S


def test_a_worker_not_measured_or_slow_is_given_something_too() -> None:
    fresh, slow = Reading(), Reading()
    read(slow, 256, 0.0, 100.0)
    for reading, most in ((fresh, UNMEASURED_TOKENS), (slow, BUSY_TOKENS)):
        given = 0
        while reading.takes(64):
            reading.add(f"{given}", 64, 100.0)
            given += 64
        assert given == most


def test_a_long_prompt_keeps_out_other_long_ones_and_lets_short_ones_by() -> None:
    reading = Reading()
    for second in range(5):
        read(reading, 2000, second, second + 1)
    assert reading.takes(8000)
    reading.add("long", 8000, 5.0)
    assert not reading.takes(8000)
    assert not reading.takes(1000)
    given = 0
    while reading.takes(100):
        reading.add(f"{given}", 100, 5.0)
        given += 100
    assert given == 2000 * WINDOW_S - 100
    reading.drop("long")
    assert reading.takes(8000)
