"""What the event loop tells the step thread, beside the gateway's own orders."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.messages import Order


@dataclass(frozen=True, slots=True)
class Ordered:
    """An order of the gateway on the other end of `session`, which came `at` a time on our clock.

    The step thread may see it a step later: that is a part of the wait.
    """

    session: int
    order: Order
    at: float


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """That gateway is gone: so are its requests."""

    session: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes even when nothing else happens: sweep what has expired."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Take nothing new; finish what runs."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """The time to finish is over: whatever runs or waits is given back to its gateway."""
