"""The one object that holds a gateway together.

HTTP (`app`, `routes`) and gRPC (`inference`) are two doors of the same room: both are made from a
Gateway and neither keeps state of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cluster.clock import Clock, monotonic
from cluster.errors import BatonError, Cancelled, Overloaded
from cluster.metrics import GatewayMetrics
from cluster.pressure import POLL_S, Pressure
from gateway.ask import Limits
from gateway.calls import Calls
from gateway.keys import Keys
from gateway.pools import Pools
from gateway.quota import Quotas
from gateway.reattach import Kept
from gateway.scrape import Siblings
from gateway.sequencer import Sequencer
from gateway.text import TextPool
from gateway.tokens import Tokenizer

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Gateway:
    """One gateway process's parts. `active` counts the calls that are being answered."""

    limits: Limits
    eos_ids: tuple[int, ...]
    tokenizer: Tokenizer
    text: TextPool
    sequencer: Sequencer
    pools: Pools
    keys: Keys
    metrics: GatewayMetrics
    version: str
    created: int  # Unix time that /v1/models reports
    defaults: Mapping[str, float] = field(default_factory=dict)
    """The model's own sampling parameters, for calls that name none."""
    request_timeout_s: float = 600.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    clock: Clock = monotonic
    wall_clock: Callable[[], float] = time.time
    active: int = 0
    siblings: Siblings | None = None  # where several gateways share a port
    pressure: Pressure = field(default_factory=lambda: Pressure(0))
    calls: Calls = field(default_factory=Calls)
    kept: Kept = field(default_factory=Kept)
    quotas: Quotas = field(init=False)

    def __post_init__(self) -> None:
        self.quotas = Quotas(self.clock)

    def check_pressure(self) -> None:
        """Before anything is done for a new call. Raises Overloaded: this process has no room."""
        if short := self.pressure.high:
            raise Overloaded(f"The server is short of {short}.", retry_after=POLL_S)

    def limits_now(self) -> Limits:
        """The limits with what the workers that are there now have room for."""
        capacity = self.pools.capacity()
        if capacity is None:
            return self.limits
        room = min(self.limits.max_prompt_tokens, capacity)
        return replace(self.limits, max_prompt_tokens=room)

    def account_for(self, error: Exception, request_id: str) -> BatonError:
        """Log and count a failed call. What the client is told: our own errors as they are, of any
        other only that it happened."""
        if not isinstance(error, BatonError):
            log.error("request failed", extra={"request_id": request_id}, exc_info=error)
            error = BatonError("The server failed on this request. Its log knows more.")
        if isinstance(error, Cancelled):
            self.metrics.cancelled()
        else:
            self.metrics.error(error.code)
        return error
