"""Trace: what the first steps of a worker do, as a file for Perfetto or chrome://tracing.

Wraps stage and runner; the step loop does not know of it. The trace shows each part of a step, the
operators of torch beneath it and, on a GPU, the kernels. Tracing slows the steps it sees.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cluster.errors import StartError
from cluster.messages import Load
from engine.batch import Attention, Batch, Plan
from engine.loop import Outcome, Runner, Stage
from engine.sampler import Sampled

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Trace:
    """Records `steps` steps from the first one on, then writes them to `file`."""

    def __init__(self, file: Path, steps: int) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"--profile {file.parent}: {error.strerror}") from None
        self._file = file
        self._left = steps
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)
        self._begun = False

    def of(self, stage: Stage, runner: Runner) -> tuple[Stage, Runner]:
        """The two to run in their place."""
        return _TracedStage(stage, self), _TracedRunner(runner, self)

    def part(self, name: str, work: Callable[[], Result]) -> Result:
        """One part of a step."""
        if self._left <= 0:
            return work()
        with record_function(name):
            return work()

    def begin(self) -> None:
        """A step begins; on the step thread, like all that follows."""
        if not self._begun:
            self._begun = True
            self._profile.start()

    def ended(self) -> None:
        """A step was accepted."""
        self._left -= 1
        if self._left == 0:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._file))
            log.info("trace written", extra={"file": str(self._file)})


class _TracedStage:
    def __init__(self, stage: Stage, trace: Trace) -> None:
        self._stage = stage
        self._trace = trace

    def apply(self, order: Any) -> None:
        self._trace.part(f"apply {type(order).__name__}", lambda: self._stage.apply(order))

    def plan(self) -> Plan:
        return self._trace.part("plan", self._stage.plan)

    def make_room(self, plan: Plan) -> None:
        self._trace.begin()
        self._trace.part("make_room", lambda: self._stage.make_room(plan))

    def batch(self, plan: Plan) -> tuple[Batch, Attention]:
        return self._trace.part("batch", lambda: self._stage.batch(plan))

    def accept(self, plan: Plan, sampled: list[Sampled | None]) -> None:
        self._trace.part("accept", lambda: self._stage.accept(plan, sampled))
        self._trace.ended()

    def fail(self, plan: Plan, error: Exception) -> None:
        self._stage.fail(plan, error)

    def mail(self) -> list[Any]:
        return self._stage.mail()

    def load(self, progress: int) -> Load:
        return self._stage.load(progress)


class _TracedRunner:
    def __init__(self, runner: Runner, trace: Trace) -> None:
        self._runner = runner
        self._trace = trace

    @property
    def ahead(self) -> bool:
        return self._runner.ahead

    def launch(self, batch: Batch, attention: Attention) -> Outcome:
        outcome = self._trace.part("launch", lambda: self._runner.launch(batch, attention))
        return lambda: self._trace.part("outcome", outcome)
