from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from cluster.messages import Load, Request
from engine import loop
from engine.batch import Batch, Chunk, Plan
from engine.models.decoder import Attend
from engine.sampler import Sampled
from engine.sequence import Sequence

SEQUENCE = Sequence(Request("r", (1, 2)), 1, 0, 0.0)
WORK = Plan((Chunk(SEQUENCE, 2),))


class Stage:
    """Has one step to run for each order that is a number, and writes down what is asked of it."""

    def __init__(self) -> None:
        self.left = 0
        self.calls: list[Any] = []
        self.breaks = ""

    def apply(self, order: int) -> None:
        self.calls.append(("apply", order))
        self.left += order

    def plan(self) -> Plan:
        if not self.left:
            return Plan()
        self.left -= 1
        return WORK

    def make_room(self, plan: Plan) -> None:
        self._call("make_room")

    def batch(self, plan: Plan) -> tuple[Batch, Attend]:
        self._call("batch")
        nothing = torch.zeros(0, dtype=torch.int64)
        return Batch(nothing, nothing, nothing, (), 0, nothing, ()), lambda layer, q, k, v: q

    def accept(self, plan: Plan, sampled: list[Sampled]) -> None:
        self.calls.append(("accept", sampled))

    def fail(self, plan: Plan, error: Exception) -> None:
        self.calls.append(("fail", str(error)))

    def mail(self) -> list[Any]:
        mail, self.calls = self.calls, []
        return mail

    def load(self, progress: int) -> Load:
        return Load(progress)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.breaks == name:
            raise RuntimeError(f"{name} broke")


class Runner:
    def forward(self, batch: Batch, attend: Attend) -> list[Sampled]:
        return [Sampled(5)]


STEP = ["make_room", "batch", ("accept", [Sampled(5)])]


def test_an_empty_plan_is_no_step() -> None:
    stage = Stage()
    assert loop.step(stage, Runner()) is False
    assert stage.calls == []


def test_a_step_in_its_order() -> None:
    stage = Stage()
    stage.left = 1
    assert loop.step(stage, Runner()) is True
    assert stage.calls == STEP


@pytest.mark.parametrize("where", ["make_room", "batch"])
def test_a_step_that_raises_is_given_to_the_stage(where: str) -> None:
    stage = Stage()
    stage.left, stage.breaks = 1, where
    assert loop.step(stage, Runner()) is True
    assert stage.calls[-1] == ("fail", f"{where} broke")
    assert not any(isinstance(call, tuple) and call[0] == "accept" for call in stage.calls)


def test_the_inbox_gives_all_there_is_in_order() -> None:
    inbox = loop.Inbox()
    assert list(inbox.take(wait=False)) == []
    for number in range(3):
        inbox.put(number)
    assert list(inbox.take(wait=True)) == [0, 1, 2]


def test_it_steps_while_there_is_work_and_waits_for_orders_else() -> None:
    stage, inbox = Stage(), loop.Inbox()
    told: list[tuple[list[Any], int]] = []
    quiet = threading.Event()

    def tell(mail: list[Any], load: Load) -> None:
        told.append((mail, load.progress))
        if load.progress == 3:  # two steps, and a pass that finds nothing more to do
            quiet.set()

    thread = threading.Thread(target=loop.run, args=(stage, Runner(), inbox, tell), daemon=True)
    thread.start()
    inbox.put(2)
    assert quiet.wait(10)
    inbox.put(1)
    inbox.put(loop.Stop())
    inbox.put(9)  # after the end
    thread.join(10)
    assert not thread.is_alive()
    assert told[:3] == [([("apply", 2), *STEP], 1), (STEP, 2), ([], 3)]
    assert ("apply", 9) not in stage.calls
