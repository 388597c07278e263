"""The step loop: the only code that touches the device, blocks and sequences. All stages run it.

    event loop thread                          step thread
    gRPC, ZeroMQ  ---- Inbox (orders) ---->    apply, plan, make room, step, accept
                  <--- Outbox (mail)  -----

The two threads share nothing else.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from cluster.messages import Load
from engine.batch import Batch, Plan
from engine.models.decoder import Attend
from engine.sampler import Sampled

log = logging.getLogger(__name__)


class Stop:
    """The last order: the step loop returns."""


class Inbox:
    """Orders on their way to the step thread. `put` may be called from any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, order: Any) -> None:
        self._queue.put(order)

    def take(self, wait: bool) -> Iterable[Any]:
        """What has arrived by now, in order. With `wait`, blocks until there is something.

        What comes while this is worked through waits for the next step, so that a burst of KV holds
        up the running answers no longer than one credit's worth of it takes.
        """
        if wait:
            yield self._queue.get()
        for _ in range(self._queue.qsize()):
            yield self._queue.get_nowait()


class Stage(Protocol):
    """What differs between prefill and decode. Every method runs on the step thread."""

    def apply(self, order: Any) -> None:
        """Take one order in. Never computes."""

    def plan(self) -> Plan:
        """Decide the next step; an empty one if nothing can run."""

    def make_room(self, plan: Plan) -> None:
        """Give every chunk of the plan the blocks that it writes."""

    def batch(self, plan: Plan) -> tuple[Batch, Attend]:
        """The plan as tensors, and the attention to run it with."""

    def accept(self, plan: Plan, sampled: list[Sampled | None]) -> None:
        """Account for a finished step: tokens, endings, blocks. None: no token could be chosen."""

    def fail(self, plan: Plan, error: Exception) -> None:
        """A step raised: give up every sequence in it."""

    def mail(self) -> list[Any]:
        """What the event loop is to be told since the last call."""

    def load(self, progress: int) -> Load:
        """The state to report."""


class Forward(Protocol):
    def forward(self, batch: Batch, attend: Attend) -> list[Sampled | None]: ...


def step(stage: Stage, runner: Forward) -> bool:
    """One step. False if nothing can run until another order comes."""
    plan = stage.plan()
    if not plan.chunks:
        return False
    try:
        stage.make_room(plan)
        batch, attend = stage.batch(plan)
        sampled = runner.forward(batch, attend)
    except Exception as error:
        log.exception("step failed", extra={"sequences": len(plan.chunks)})
        stage.fail(plan, error)
    else:
        stage.accept(plan, sampled)
    return True


def run(
    stage: Stage,
    runner: Forward,
    inbox: Inbox,
    tell: Callable[[list[Any], Load], None],
) -> None:
    """Take the mail, plan, step, tell. Returns after Stop. `tell` must be safe across threads."""
    progress, busy = 0, False
    while True:
        for order in inbox.take(wait=not busy):
            if isinstance(order, Stop):
                return
            stage.apply(order)
        busy = step(stage, runner)
        progress += 1
        tell(stage.mail(), stage.load(progress))
