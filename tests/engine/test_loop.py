from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.messages import Load, Request, Sampling
from engine import loop
from engine.batch import Attention, Batch, Chunk, Plan
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

    def batch(self, plan: Plan) -> tuple[Batch, Attention]:
        self._call("batch")
        nothing = torch.zeros(0, dtype=torch.int64)
        tensors = (nothing,) * 7
        return Batch(*tensors, (), (), (), 0), lambda batch: lambda layer, write: nothing

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
    ahead = False

    def launch(self, batch: Batch, attention: Attention) -> loop.Outcome:
        return lambda: [Sampled(5)]


STEP = ["make_room", "batch", ("accept", [Sampled(5)])]


def test_an_empty_plan_is_no_step() -> None:
    stage = Stage()
    assert loop.Steps(stage, Runner()).step() is False
    assert stage.calls == []


def test_a_step_in_its_order() -> None:
    stage = Stage()
    stage.left = 1
    assert loop.Steps(stage, Runner()).step() is True
    assert stage.calls == STEP


@pytest.mark.parametrize("where", ["make_room", "batch"])
def test_a_step_that_raises_is_given_to_the_stage(where: str) -> None:
    stage = Stage()
    stage.left, stage.breaks = 1, where
    assert loop.Steps(stage, Runner()).step() is True
    assert stage.calls[-1] == ("fail", f"{where} broke")
    assert not any(isinstance(call, tuple) and call[0] == "accept" for call in stage.calls)


def test_the_inbox_gives_all_there_is_in_order() -> None:
    inbox = loop.Inbox()
    assert list(inbox.take(wait=False)) == []
    for number in range(3):
        inbox.put(number)
    assert list(inbox.take(wait=True)) == [0, 1, 2]


def test_each_order_counts_before_the_next_is_taken() -> None:
    """The step loop moves within the longest row of them."""
    inbox = loop.Inbox()
    for number in range(3):
        inbox.put(number)
    assert [inbox.taken for _ in inbox.take(wait=True)] == [1, 2, 3]


def test_it_steps_while_there_is_work_and_waits_for_orders_else() -> None:
    stage, inbox = Stage(), loop.Inbox()
    told: list[tuple[list[Any], int | None]] = []
    quiet = threading.Event()

    def tell(mail: list[Any], load: Load | None) -> None:
        told.append((mail, load and load.progress))
        if load and load.progress == 3:  # two steps, and a pass that finds nothing more to do
            quiet.set()

    def run() -> None:
        loop.run(stage, Runner(), inbox, tell, clock=lambda: 0.0)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    inbox.put(2)
    assert quiet.wait(10)
    inbox.put(1)
    inbox.put(loop.Stop())
    inbox.put(9)  # after the end
    thread.join(10)
    assert not thread.is_alive()
    assert told[:4] == [([("apply", 2)], None), (STEP, 1), (STEP, None), ([], 3)]
    assert ("apply", 9) not in stage.calls


def test_a_load_is_told_now_and_then_while_steps_follow_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "LOAD_S", 4.0)
    stage, inbox, now = Stage(), loop.Inbox(), [0.0]
    told: list[int | None] = []

    def tell(mail: list[Any], load: Load | None) -> None:
        told.append(load and load.progress)
        now[0] += 1.0
        if not stage.left:
            inbox.put(loop.Stop())

    inbox.put(9)
    loop.run(stage, Runner(), inbox, tell, clock=lambda: now[0])
    assert told == [None, 1, None, None, None, 5, None, None, None, 9]


class AheadStage(Stage):
    """Two sequences that go on for `left` tokens each."""

    def __init__(self, *left: int) -> None:
        super().__init__()
        self.sequences = []
        for number, count in enumerate(left):
            sampling = Sampling(max_tokens=count)
            sequence = Sequence(Request(str(number), (1, 2), sampling), 1, 0, 0.0)
            sequence.computed = 1
            self.sequences.append(sequence)

    def plan(self) -> Plan:
        alive = [s for s in self.sequences if not s.full and not s.ended]
        return Plan(tuple(Chunk(sequence, 1) for sequence in alive))

    def batch(self, plan: Plan) -> tuple[Batch, Attention]:
        batch, attention = super().batch(plan)
        chunks = plan.chunks
        tokens = [chunk.sequence.tokens[chunk.sequence.computed] for chunk in chunks]
        return batch.on(tokens=torch.tensor(tokens)), attention

    def accept(self, plan: Plan, sampled: list[Sampled | None]) -> None:
        super().accept(plan, sampled)
        for chunk, one in zip(plan.chunks, sampled, strict=True):
            assert one is not None
            if not chunk.sequence.ended and chunk.sequence.take(one.token, ()).finish:
                chunk.sequence.ended = True

    def fail(self, plan: Plan, error: Exception) -> None:
        super().fail(plan, error)
        for chunk in plan.chunks:
            chunk.sequence.ended = True


class AheadRunner:
    """Remembers what it was asked and when its outcomes were."""

    ahead = True

    def __init__(self, breaks_at: int = -1) -> None:
        self.log: list[Any] = []
        self._breaks_at = breaks_at

    def launch(self, batch: Batch, attention: Attention) -> loop.Outcome:
        step = sum(1 for entry in self.log if entry[0] == "launch")
        self.log.append(("launch", step, batch.tokens.tolist()))

        def outcome() -> list[Sampled | None]:
            self.log.append(("outcome", step))
            if step == self._breaks_at:
                raise RuntimeError("the device is on fire")
            return [Sampled(100 * step + row) for row in range(len(batch.tokens))]

        return outcome


def test_a_step_ahead_is_launched_before_the_one_before_it_is_accepted() -> None:
    stage, runner = AheadStage(3, 2), AheadRunner()
    steps = loop.Steps(stage, runner)
    while steps.step():
        pass
    assert runner.log == [
        ("launch", 0, [2, 2]),
        ("launch", 1, [-1, -2]),  # what samples 0 and 1 of step 0 will be
        ("outcome", 0),
        ("launch", 2, [-1]),  # the second has all its tokens by then
        ("outcome", 1),
        ("outcome", 2),
    ]
    assert [s.tokens for s in stage.sequences] == [[1, 2, 0, 100, 200], [1, 2, 1, 101]]


def test_orders_are_taken_with_nothing_under_way() -> None:
    stage, runner = AheadStage(9), AheadRunner()
    steps = loop.Steps(stage, runner)
    assert steps.step() and steps.step()
    assert [entry[0] for entry in runner.log] == ["launch", "launch", "outcome"]
    steps.settle()
    assert [entry[0] for entry in runner.log] == ["launch", "launch", "outcome", "outcome"]
    assert stage.sequences[0].pending == 0
    steps.settle()
    assert len(runner.log) == 4


@pytest.mark.parametrize("sampling", [Sampling(presence_penalty=1.0), Sampling(min_tokens=5)])
def test_a_token_that_depends_on_those_before_waits_for_them(sampling: Sampling) -> None:
    stage, runner = AheadStage(4), AheadRunner()
    request = replace(stage.sequences[0].request, sampling=replace(sampling, max_tokens=3))
    stage.sequences[0].request = request
    steps = loop.Steps(stage, runner)
    while steps.step():
        pass
    assert [entry[0] for entry in runner.log] == ["launch", "outcome"] * 3


def test_a_step_that_breaks_under_way_ends_its_sequences_and_no_more() -> None:
    stage, runner = AheadStage(9), AheadRunner(breaks_at=1)
    steps = loop.Steps(stage, runner)
    while steps.step():
        pass
    failed = [call for call in stage.calls if call[0] == "fail"]
    assert failed == [("fail", "the device is on fire")]
    assert stage.sequences[0].ended
    assert [entry[:2] for entry in runner.log][-1] == ("outcome", 2)  # it was under way already


class FailingRunner:
    """Raises what it is told to, step by step; None succeeds."""

    ahead = False

    def __init__(self, *errors: Exception | None) -> None:
        self._errors = iter(errors)

    def launch(self, batch: Batch, attention: Attention) -> loop.Outcome:
        error = next(self._errors)
        if error is not None:
            raise error
        return lambda: [Sampled(5)]


def test_a_device_that_fails_is_not_tried_again() -> None:
    """Nor is a sequence failed for it: it goes on elsewhere."""
    stage = Stage()
    stage.left = 2
    steps = loop.Steps(stage, FailingRunner(torch.AcceleratorError("an illegal access")))
    with pytest.raises(loop.Sick, match="device"):
        steps.step()
    assert stage.calls == ["make_room", "batch"]


def test_a_device_that_fails_under_way_is_not_tried_again() -> None:
    class Lost(AheadRunner):
        def launch(self, batch: Batch, attention: Attention) -> loop.Outcome:
            super().launch(batch, attention)

            def outcome() -> list[Sampled | None]:
                raise torch.AcceleratorError("it fell off the bus")

            return outcome

    stage = AheadStage(9)
    steps = loop.Steps(stage, Lost())
    assert steps.step()
    with pytest.raises(loop.Sick):
        steps.step()
    assert not stage.sequences[0].ended


def test_it_is_sick_when_nothing_succeeds_between_failures() -> None:
    bad, out_of_memory = ValueError("bad"), torch.OutOfMemoryError("full")
    stage = Stage()
    stage.left = 9
    steps = loop.Steps(stage, FailingRunner(bad, out_of_memory, None, bad, out_of_memory, bad))
    for _ in range(5):
        assert steps.step()
    assert [call for call in stage.calls if call[0] == "fail"] == [
        ("fail", "bad"),
        ("fail", "full"),
    ] * 2
    with pytest.raises(loop.Sick, match="3 steps failed in a row"):
        steps.step()


def test_a_meter_is_told_of_each_step() -> None:
    class Meter:
        def __init__(self) -> None:
            self.steps: list[tuple[float, float]] = []

        def step(self, batch: Batch, forward_s: float, whole_s: float) -> None:
            self.steps.append((forward_s, whole_s))

    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    stage, meter = Stage(), Meter()
    stage.left = 1
    assert loop.Steps(stage, Runner(), meter, clock).step()
    # Began, ready, launched, asked, answered, accepted: the forward is two of the five between.
    assert meter.steps == [(2.0, 4.0)]
