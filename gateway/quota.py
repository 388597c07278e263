"""Quotas: how many requests and tokens a minute each tenant may have.

One bucket for each limit: it holds a minute's worth and refills evenly. A call takes one request as
it comes, and once its prompt is tokenised all the tokens it might come to, prompt and longest
answer; what was not delivered is given back at its end. A call that might come to more than a
minute's worth takes the whole bucket, and its end puts right what it really was: the bucket may be
in debt then, so in the long run the limit holds for calls of any size.

Kept by tenant, so it makes no difference where a call comes from or which of a tenant's keys it
has. One process keeps its own account: several gateways each allow as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cluster.clock import Clock
from cluster.errors import RateLimited
from gateway.keys import Tenant

MINUTE_S = 60.0


class Bucket:
    """Full at first."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        filled = (now - self._at) * self.per_minute / MINUTE_S
        return min(float(self.per_minute), self._level + filled)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is there; 0 if it is."""
        return max(0.0, (amount - self.level(now)) * MINUTE_S / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Below zero too; less than nothing gives back."""
        self._level = self.level(now) - amount
        self._at = now


@dataclass(slots=True)
class Reservation:
    """What a call took, and where: who changes a limit meanwhile changes nothing of that.

    Without a bucket there is no limit to give back to.
    """

    bucket: Bucket | None = None
    tokens: int = 0


NOTHING: Final = Reservation()


class Quotas:
    """Owned by the event loop. As many accounts as there are tenants with limits."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def request(self, tenant: Tenant, tokens: int) -> Reservation:
        """Take one request, of so many tokens at least: those are only looked for.

        Raises RateLimited, with when it would not, and takes nothing then.
        """
        buckets = {kind: self._bucket(tenant, kind, limit) for kind, limit in _limits(tenant)}
        self._buckets |= {(tenant.name, kind): bucket for kind, bucket in buckets.items()}
        for kind, bucket in buckets.items():
            self._need(kind, bucket, 1 if kind == "requests" else tokens)
        if "requests" in buckets:
            buckets["requests"].take(1, self._clock())
        return Reservation(buckets.get("tokens"))

    def reserve(self, reservation: Reservation, tokens: int) -> None:
        """Take what the call may come to. Raises RateLimited; the request is spent then."""
        if (bucket := reservation.bucket) is not None:
            reservation.tokens = self._need("tokens", bucket, tokens)
            bucket.take(reservation.tokens, self._clock())

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """The call has come to so many tokens."""
        if reservation.bucket is not None:
            reservation.bucket.take(tokens - reservation.tokens, self._clock())

    def headers(self, tenant: Tenant) -> list[tuple[bytes, bytes]]:
        """What is left, in the headers that OpenAI's clients know. None without limits."""
        now = self._clock()
        headers = []
        for kind, limit in _limits(tenant):
            bucket = self._bucket(tenant, kind, limit)
            full = bucket.wait(limit, now)
            headers += [
                (f"x-ratelimit-limit-{kind}", str(limit)),
                (f"x-ratelimit-remaining-{kind}", str(max(0, int(bucket.level(now))))),
                (f"x-ratelimit-reset-{kind}", f"{full:.3f}s"),
            ]
        return [(name.encode(), value.encode()) for name, value in headers]

    def _bucket(self, tenant: Tenant, kind: str, limit: int) -> Bucket:
        """The account, or a new one that is not kept yet where the file says another limit."""
        bucket = self._buckets.get((tenant.name, kind))
        return bucket if bucket and bucket.per_minute == limit else Bucket(limit, self._clock())

    def _need(self, kind: str, bucket: Bucket, amount: int) -> int:
        """The amount, at most a minute's worth. Raises RateLimited if so much is not there."""
        amount = min(amount, bucket.per_minute)
        wait = bucket.wait(amount, self._clock())
        if wait > 0:
            raise RateLimited(
                f"This key has used up its {kind} per minute.",
                code=f"{kind}_per_minute_exceeded",
                retry_after=wait,
            )
        return amount


def _limits(tenant: Tenant) -> list[tuple[str, int]]:
    """Those that the tenant has."""
    limits = (("requests", tenant.requests_per_minute), ("tokens", tenant.tokens_per_minute))
    return [(kind, limit) for kind, limit in limits if limit]
