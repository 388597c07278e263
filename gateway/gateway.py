"""What the front needs of the rest of the gateway, and the one object that holds it together.

HTTP (`app`, `routes`) and gRPC (`inference`) are two doors of the same room: both are made from a
Gateway and neither keeps state of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.clock import Clock, monotonic
from cluster.errors import BatonError, Cancelled
from cluster.messages import Request, Token
from cluster.metrics import GatewayMetrics
from gateway.ask import Limits
from gateway.keys import Keys
from gateway.sequencer import Watch
from gateway.text import TextPool
from gateway.tokens import Tokenizer

log = logging.getLogger(__name__)


class Sequencer(Protocol):
    """Takes a request through the pools, whatever happens to workers meanwhile."""

    def answer(self, request: Request, watch: Watch) -> AsyncGenerator[Token, None]:
        """Yields tokens with index 0, 1, 2 ... until one has a `finish`.

        Closing the generator, or cancelling the task that runs it, ends the request on all workers.
        What the caller does not fetch waits here, at most `max_tokens` of it.
        Raises BatonError: NoWorkers, Overloaded, WorkerLost, TransferFailed, EngineFailed.
        """
        ...


class Pools(Protocol):
    """The workers as the front sees them."""

    def ready(self) -> bool:
        """At least one usable pair, or one worker that does both."""
        ...

    def status(self) -> dict[str, Any]:
        """Pools, peers, load and blocks, ready for JSON."""
        ...

    async def changed(self, timeout: float) -> None:
        """Returns when any worker's state may have changed. Raises TimeoutError."""
        ...


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
    clock: Clock = monotonic
    wall_clock: Callable[[], float] = time.time
    active: int = 0

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
