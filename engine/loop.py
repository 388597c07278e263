"""The step loop: the only code that touches the device, blocks and sequences. All stages run it.

    event loop thread                          step thread
    gRPC, ZeroMQ  ---- Inbox (orders) ---->    apply, plan, make room, launch, accept
                  <--- Outbox (mail)  -----

The two threads share nothing else.

A runner that works on a device of its own may be given a step before the one before it is accepted:
the device then never waits for us. Orders are taken with nothing under way.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cluster.clock import Clock, monotonic
from cluster.messages import Load
from engine.batch import Attention, Batch, Plan
from engine.sampler import Sampled, foreseeable

log = logging.getLogger(__name__)

Outcome = Callable[[], list[Sampled | None]]
"""Waits for a launched step. One entry for each of the batch's samples, None where no token could
be chosen."""


MOST_FAILURES = 3
"""Steps in a row that may raise. One is its sequences' fault, or a moment's; with nothing computed
between three of them the next would fail too."""

LOAD_S = 0.05
"""How often a load is told while steps follow each other. One takes 20 us to make and tell, a tenth
of a small model's step, and beats are rarer."""

Tell = Callable[[list[Any], Load | None], None]
"""Takes a stage's mail, and its load if there is a new one, to the event loop; safe across
threads."""


class Sick(Exception):
    """This process computes nothing any more: start another. It is never mended from inside."""


class Stop:
    """The last order: the step loop returns."""


class Inbox:
    """Orders on their way to the step thread. `put` may be called from any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.taken = 0  # orders so far: shows that a long row of them is worked through

    def put(self, order: Any) -> None:
        self._queue.put(order)

    def take(self, wait: bool) -> Iterable[Any]:
        """What has arrived by now, in order. With `wait`, blocks until there is something.

        What comes while this is worked through waits for the next step, so that a burst of KV holds
        up the running answers no longer than one credit's worth of it takes.
        """
        if wait:
            yield self._next()
        for _ in range(self._queue.qsize()):
            yield self._next()

    def _next(self) -> Any:
        order = self._queue.get()
        self.taken += 1
        return order


class Stage(Protocol):
    """What differs between prefill and decode. Every method runs on the step thread."""

    def apply(self, order: Any) -> None:
        """Take one order in. Never computes."""

    def plan(self) -> Plan:
        """Decide the next step; an empty one if nothing can run."""

    def make_room(self, plan: Plan) -> None:
        """Give every chunk of the plan the blocks that it writes."""

    def batch(self, plan: Plan) -> tuple[Batch, Attention]:
        """The plan as tensors on the host, and what makes the attention to run it with."""

    def accept(self, plan: Plan, sampled: list[Sampled | None]) -> None:
        """Account for a finished step: tokens, endings, blocks. None: no token could be chosen."""

    def fail(self, plan: Plan, error: Exception) -> None:
        """A step raised: give up every sequence in it."""

    def mail(self) -> list[Any]:
        """What the event loop is to be told since the last call."""

    def load(self, progress: int) -> Load:
        """The state to report."""


class Runner(Protocol):
    """`ahead`: a step may be launched while the one before it is under way."""

    @property
    def ahead(self) -> bool: ...

    def launch(self, batch: Batch, attention: Attention) -> Outcome: ...


class Meter(Protocol):
    """Is told of each step: what it computed, how long the device took and the step altogether."""

    def step(self, batch: Batch, forward_s: float, whole_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way."""

    plan: Plan
    batch: Batch
    outcome: Outcome
    host_s: float  # until it was launched
    launch_s: float  # of that, in the runner


class Steps:
    """Plans, launches and accepts one step after the other. At most two are under way."""

    def __init__(
        self, stage: Stage, runner: Runner, meter: Meter | None = None, clock: Clock = monotonic
    ) -> None:
        self._stage = stage
        self._runner = runner
        self._meter = meter
        self._clock = clock
        self._flight: _Flight | None = None
        self._failures = 0  # since the last step that succeeded

    def step(self) -> bool:
        """One step. False if nothing can run until another order comes. Raises Sick."""
        began = self._clock()
        plan = self._stage.plan()
        if self._flight is not None and not _may_follow(plan):
            self.settle()
            plan = self._stage.plan()
        if not plan.chunks:
            return False
        try:
            self._stage.make_room(plan)
            batch, attention = self._stage.batch(plan)
            ready = self._clock()
            outcome = self._runner.launch(batch, attention)
        except Exception as error:
            self.settle()
            self._fail(plan, error)
            return True
        plan.launch()
        now = self._clock()
        before, self._flight = self._flight, _Flight(plan, batch, outcome, now - began, now - ready)
        if before is not None:
            self._land(before)
        if not self._runner.ahead:
            self.settle()
        return True

    def settle(self) -> None:
        """Wait for the step that is under way, if any."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._land(flight)

    def _land(self, flight: _Flight) -> None:
        began = self._clock()
        try:
            sampled = flight.outcome()
        except Exception as error:
            self._fail(flight.plan, error)
            return
        self._failures = 0
        waited = self._clock() - began
        self._stage.accept(flight.plan, sampled)
        if self._meter is not None:
            whole = flight.host_s + self._clock() - began
            # Launching for another device is our work; computing in the call is not.
            forward = waited if self._runner.ahead else waited + flight.launch_s
            self._meter.step(flight.batch, forward, whole)

    def _fail(self, plan: Plan, error: Exception) -> None:
        """Give up what was in the step, and only that; or this process, if it would go on so.

        The sequences of the last step are told of nothing: losing us, they go on elsewhere.
        """
        log.error("step failed", exc_info=error, extra={"sequences": len(plan.chunks)})
        # One launched ahead of a step that failed says nothing new.
        self._failures += any(not chunk.sequence.ended for chunk in plan.chunks)
        if isinstance(error, torch.AcceleratorError):
            raise Sick("the device fails") from error
        if self._failures == MOST_FAILURES:
            raise Sick(f"{MOST_FAILURES} steps failed in a row") from error
        self._stage.fail(plan, error)


def _may_follow(plan: Plan) -> bool:
    """Whether it can be launched before the tokens of the step before it are known: one more token
    for sequences that had one, each chosen without a look at what came before."""
    return (
        bool(plan.chunks)
        and not plan.evicted
        and all(
            chunk.count == 1 and chunk.sequence.pending and foreseeable(chunk.sequence)
            for chunk in plan.chunks
        )
    )


def run(
    stage: Stage,
    runner: Runner,
    inbox: Inbox,
    tell: Tell,
    meter: Meter | None = None,
    clock: Clock = monotonic,
) -> None:
    """Take the mail, plan, step, tell. Returns after Stop. Raises Sick."""
    steps = Steps(stage, runner, meter, clock)
    progress, busy, due = 0, False, clock()
    while True:
        for order in inbox.take(wait=not busy):
            steps.settle()
            if isinstance(order, Stop):
                return
            stage.apply(order)
        if mail := stage.mail():  # a promise waits for no step
            tell(mail, None)
        busy = steps.step()
        progress += 1
        mail, load = stage.mail(), None
        if not busy or clock() >= due:
            load, due = stage.load(progress), clock() + LOAD_S
        if mail or load is not None:
            tell(mail, load)
