from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import RateLimited
from gateway.keys import ANYONE, Tenant
from gateway.quota import Quotas, Reservation

LIMITED = Tenant("limited", b"", requests_per_minute=6, tokens_per_minute=600)


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def quotas(time: Time) -> Quotas:
    return Quotas(time)


def take(quotas: Quotas, tenant: Tenant, tokens: int) -> Reservation:
    """As a call does."""
    reservation = quotas.request(tenant, tokens)
    quotas.reserve(reservation, tokens)
    return reservation


def left(quotas: Quotas, tenant: Tenant = LIMITED) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in quotas.headers(tenant)}


def test_who_has_no_limits_has_no_account(quotas: Quotas) -> None:
    for _ in range(1000):
        quotas.settle(take(quotas, ANYONE, 10**9), 0)
    assert not quotas._buckets and not quotas.headers(ANYONE)


def test_requests_beyond_the_limit_are_told_when_there_will_be_one(
    quotas: Quotas, time: Time
) -> None:
    for _ in range(6):
        take(quotas, LIMITED, 1)
    with pytest.raises(RateLimited) as refused:
        take(quotas, LIMITED, 1)
    assert (refused.value.http, refused.value.grpc) == (429, "RESOURCE_EXHAUSTED")
    assert refused.value.code == "requests_per_minute_exceeded"
    assert refused.value.retry_after == pytest.approx(10.0)
    time.now += 9.9
    with pytest.raises(RateLimited):
        take(quotas, LIMITED, 1)
    time.now += 0.11
    take(quotas, LIMITED, 1)


def test_the_promised_moment_is_the_moment(quotas: Quotas, time: Time) -> None:
    take(quotas, LIMITED, 600)
    with pytest.raises(RateLimited) as refused:
        quotas.request(LIMITED, 123)
    assert refused.value.code == "tokens_per_minute_exceeded"
    assert refused.value.retry_after == pytest.approx(12.3)
    time.now += 12.3 + 1e-6
    quotas.request(LIMITED, 123)


def test_what_was_not_delivered_is_given_back(quotas: Quotas) -> None:
    reservation = take(quotas, LIMITED, 500)
    assert left(quotas)["x-ratelimit-remaining-tokens"] == "100"
    quotas.settle(reservation, 40)
    assert left(quotas)["x-ratelimit-remaining-tokens"] == "560"
    quotas.settle(take(quotas, LIMITED, 560), 560)
    assert left(quotas)["x-ratelimit-remaining-tokens"] == "0"


def test_giving_back_makes_no_more_than_a_minutes_worth(quotas: Quotas, time: Time) -> None:
    reservation = take(quotas, LIMITED, 600)
    time.now += 60
    quotas.settle(reservation, 0)
    assert left(quotas)["x-ratelimit-remaining-tokens"] == "600"
    take(quotas, LIMITED, 600)
    assert left(quotas)["x-ratelimit-remaining-tokens"] == "0"


def test_a_call_larger_than_a_minutes_worth_takes_it_all_and_pays_later(
    quotas: Quotas, time: Time
) -> None:
    take(quotas, LIMITED, 1)
    with pytest.raises(RateLimited):
        take(quotas, LIMITED, 5000)  # not before the bucket is full
    time.now += 60
    reservation = take(quotas, LIMITED, 5000)
    quotas.settle(reservation, 1800)
    with pytest.raises(RateLimited) as refused:
        quotas.request(LIMITED, 60)
    assert refused.value.retry_after == pytest.approx((1200 + 60) / 10)


def test_who_is_refused_has_taken_nothing(quotas: Quotas, time: Time) -> None:
    take(quotas, LIMITED, 600)
    for _ in range(20):
        with pytest.raises(RateLimited):
            take(quotas, LIMITED, 100)
    assert left(quotas)["x-ratelimit-remaining-requests"] == "5"


def test_in_the_long_run_the_limit_is_kept(quotas: Quotas, time: Time) -> None:
    delivered = 0
    for _ in range(3600):
        time.now += 1
        try:
            reservation = take(quotas, LIMITED, 200)
        except RateLimited:
            continue
        quotas.settle(reservation, 130)
        delivered += 130
    assert delivered <= 600 * 61


def test_tenants_have_accounts_of_their_own(quotas: Quotas) -> None:
    take(quotas, LIMITED, 600)
    take(quotas, replace(LIMITED, name="other"), 600)
    with pytest.raises(RateLimited):
        take(quotas, replace(LIMITED, salt=b"another key of the same tenant"), 1)


def test_a_changed_limit_holds_at_once(quotas: Quotas) -> None:
    take(quotas, LIMITED, 600)
    take(quotas, replace(LIMITED, tokens_per_minute=1000), 900)
    assert len(quotas._buckets) == 2


def test_a_call_that_began_under_another_limit_does_not_touch_the_new_account(
    quotas: Quotas,
) -> None:
    """Neither by what it takes or gives back, nor by the headers of its answer."""
    old = LIMITED
    running, tokenising = take(quotas, old, 500), quotas.request(old, 50)
    new = replace(LIMITED, tokens_per_minute=2000)
    take(quotas, new, 1900)
    quotas.settle(running, 0)
    quotas.reserve(tokenising, 50)
    assert left(quotas, old)["x-ratelimit-remaining-tokens"] == "600"
    assert left(quotas, new)["x-ratelimit-remaining-tokens"] == "100"


def test_tokens_that_turn_out_too_many_have_cost_a_request(quotas: Quotas) -> None:
    take(quotas, LIMITED, 300)
    reservation = quotas.request(LIMITED, 300)
    with pytest.raises(RateLimited):
        quotas.reserve(reservation, 301)
    assert left(quotas)["x-ratelimit-remaining-requests"] == "4"
    assert left(quotas)["x-ratelimit-remaining-tokens"] == "300"


def test_headers_are_those_that_openai_has(quotas: Quotas) -> None:
    take(quotas, LIMITED, 150)
    assert left(quotas) == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "5",
        "x-ratelimit-reset-requests": "10.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "450",
        "x-ratelimit-reset-tokens": "15.000s",
    }
