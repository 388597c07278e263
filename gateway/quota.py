"""Quotas: how many requests and tokens a minute each tenant may have.

One bucket for each limit: it holds a minute's worth and refills evenly. A call takes one request
and all the tokens it might come to, prompt and longest answer; what was not delivered is given back
at its end. A call that might come to more than a minute's worth takes the whole bucket, and its end
puts right what it really was: the bucket may be in debt then, so in the long run the limit holds
for calls of any size.

Kept by tenant, so it makes no difference where a call comes from or which of a tenant's keys it
has. One process keeps its own account: several gateways each allow as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cluster.clock import Clock
from cluster.errors import RateLimited
from gateway.keys import ANYONE, Tenant

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


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a call took. `tokens` 0: there is no limit to give back to."""

    tenant: Tenant
    tokens: float = 0.0


NOTHING: Final = Reservation(ANYONE)


class Quotas:
    """Owned by the event loop. As many accounts as there are tenants with limits."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def check(self, tenant: Tenant, tokens: int) -> None:
        """Raises RateLimited, with when it would not, for a call of so many tokens at least."""
        now = self._clock()
        for kind, bucket in self._limits(tenant):
            wait = bucket.wait(_amount(kind, bucket, tokens), now)
            if wait > 0:
                raise RateLimited(
                    f"This key has used up its {kind} per minute.",
                    code=f"{kind}_per_minute_exceeded",
                    retry_after=wait,
                )

    def reserve(self, tenant: Tenant, tokens: int) -> Reservation:
        """Take what the call may come to. Raises RateLimited, and takes nothing then."""
        self.check(tenant, tokens)
        now, reserved = self._clock(), 0.0
        for kind, bucket in self._limits(tenant):
            amount = _amount(kind, bucket, tokens)
            bucket.take(amount, now)
            if kind == "tokens":
                reserved = amount
        return Reservation(tenant, reserved)

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """The call has come to so many tokens."""
        if reservation.tokens:
            for kind, bucket in self._limits(reservation.tenant):
                if kind == "tokens":
                    bucket.take(tokens - reservation.tokens, self._clock())

    def headers(self, tenant: Tenant) -> list[tuple[bytes, bytes]]:
        """What is left, in the headers that OpenAI's clients know. None without limits."""
        now = self._clock()
        headers = []
        for kind, bucket in self._limits(tenant):
            full = bucket.wait(bucket.per_minute, now)
            headers += [
                (f"x-ratelimit-limit-{kind}", str(bucket.per_minute)),
                (f"x-ratelimit-remaining-{kind}", str(max(0, int(bucket.level(now))))),
                (f"x-ratelimit-reset-{kind}", f"{full:.3f}s"),
            ]
        return [(name.encode(), value.encode()) for name, value in headers]

    def _limits(self, tenant: Tenant) -> Iterator[tuple[str, Bucket]]:
        limits = {"requests": tenant.requests_per_minute, "tokens": tenant.tokens_per_minute}
        for kind, per_minute in limits.items():
            if not per_minute:
                continue
            bucket = self._buckets.get((tenant.name, kind))
            if bucket is None or bucket.per_minute != per_minute:  # new, or changed in the file
                bucket = Bucket(per_minute, self._clock())
                self._buckets[tenant.name, kind] = bucket
            yield kind, bucket


def _amount(kind: str, bucket: Bucket, tokens: int) -> float:
    return 1.0 if kind == "requests" else float(min(tokens, bucket.per_minute))
