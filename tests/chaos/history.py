"""History: what every client saw and every worker's books, held to the invariants I1-I9.

    I1  every request ends exactly once: its finish, an error with a code, or its client is gone
    I2  indices 0, 1, 2, ... whatever attempt a token came from
    I3  the tokens are those that the prompt alone says, all of them if the answer finished
    I4  no token from KV that is not whole: the model reads back from the pages what it answers from
    I5  the ledger adds up after every step (tests.ledger), and nothing is held once all have ended
    I6  others change nothing: I3 in whatever company; and no tenant finds another one's prefix
    I7  nothing is left of a request that has ended, on either side, nor of one that never was
    I8  usage is what was delivered: indices count it, a finish for length is exactly at max_tokens
    I9  nothing waits for ever: every request ends within its deadline, and the run ends

and to what a request may cost: at most three attempts, at most one death before the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from cluster.messages import Request, Token
from decode.stage import DecodeStage
from gateway.relay import Watch
from prefill.stage import PrefillStage
from tests.cluster_in_process import Cluster, Gateway, Worker
from tests.hash_model import expected
from tests.ledger import check_ledger

FINISHED = ("stop", "length")
MAX_LOSSES = 2
"""A third one ends the request."""
DEATHS = ("died", "hung", "engine")
HARMLESS_PHASES = ("queued", "promising")
"""Nothing of a request is computed yet, so nobody can have died of it."""
DEADLY_PHASES = ("handing_off", "decoding")
"""Whoever is lost has computed something of it. In between, only who reads its prompt has."""
LATE_S = 0.01


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(slots=True)
class Told:
    """One request as its client saw it. `end` is a finish, an error's code, or why the client went:
    "gone" of its own will, "gateway died" under it, "unreachable" from the start."""

    request: Request
    gateway: str
    arrived: float
    deadline: float
    watch: Watch
    tokens: list[Token] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of the tokens
    ends: list[str] = field(default_factory=list)
    ended: float = 0.0

    @property
    def end(self) -> str:
        return self.ends[0] if self.ends else "nothing"

    @property
    def pause(self) -> float:
        """The longest that its client waited for the next token. Of a client that reads at once."""
        waits = zip([self.arrived, *self.times], self.times, strict=False)
        return max((then - before for before, then in waits), default=0.0)

    @property
    def causes(self) -> list[str]:
        return [recovery.cause for recovery in self.watch.recoveries]


class History:
    """Of one run. Every check raises Violation."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def check(self) -> None:
        for told in self.told:
            for problem in _problems(told):
                raise Violation(
                    f"{told.request.id} ({', '.join(told.causes) or 'calm'}): {problem}"
                )
            self._check_prefix(told)

    def check_everyone_finished(self) -> None:
        """For a run in which nothing happened that a request may fail of."""
        for told in self.told:
            if told.end not in (*FINISHED, "gone", "gateway died", "unreachable"):
                raise Violation(f"{told.request.id} failed: {told.end} after {told.causes}")

    def check_nobody_recovered(self) -> None:
        for told in self.told:
            if told.causes:
                raise Violation(f"{told.request.id} recovered from {told.causes} for no reason")

    def check_pauses(self, most: float) -> None:
        """I9: what happened was noticed in time."""
        for told in self.told:
            if told.pause > most:
                raise Violation(f"{told.request.id} paused {told.pause:.3f} s: {told.causes}")

    def _check_prefix(self, told: Told) -> None:
        """I6: a cache hit is of the same salt, and no longer than what that salt has said."""
        if not told.watch.cached_tokens or told.tokens[0].attempt > 1:
            return  # on a later attempt the prefix may be its own
        longest = max(
            (
                _common(told.request.tokens, (*other.request.tokens, *expected(other.request)))
                for other in self.told
                if other.request.salt == told.request.salt
                and other is not told
                and other.arrived < told.times[0]
            ),
            default=0,
        )
        if told.watch.cached_tokens > longest:
            raise Violation(f"{told.request.id}: {told.watch.cached_tokens} tokens of a stranger")


def _problems(told: Told) -> Iterator[str]:
    sampling, finish = told.request.sampling, [token.finish for token in told.tokens]
    tokens, right = [token.token for token in told.tokens], expected(told.request)
    if len(told.ends) != 1:
        yield f"I1: ended {len(told.ends)} times: {told.ends}"
    if told.end in FINISHED and (not finish or finish[-1] != told.end):
        yield f"I1: ended with {told.end} and no such finish"
    if any(finish[:-1]) or (any(finish) and told.end not in FINISHED):
        yield f"I1: a finish, and then more: {told.end}"
    if [token.index for token in told.tokens] != list(range(len(tokens))):
        yield f"I2: indices {[token.index for token in told.tokens]}"
    if tokens != right[: len(tokens)]:
        yield f"I3: {tokens} instead of {right}"
    if told.end in FINISHED and len(tokens) != len(right):
        yield f"I3: finished after {len(tokens)} of {len(right)} tokens"
    if told.end == "length" and len(tokens) != sampling.max_tokens:
        yield f"I8: {len(tokens)} tokens of {sampling.max_tokens} for length"
    if told.ended > told.deadline + LATE_S:
        yield f"I9: ended {told.ended - told.deadline:.3f} s after its deadline"
    losses = [cause for cause in told.causes if cause != "drained"]
    if len(losses) > MAX_LOSSES:
        yield f"{len(losses)} losses, and it went on"
    if told.end in ("worker_lost", "transfer_failed", "token_lost") and len(losses) < MAX_LOSSES:
        yield f"{told.end} after {len(losses)} losses: attempts were left"
    died = [recovery.phase for recovery in told.watch.recoveries if recovery.cause in DEATHS]
    if sum(phase in DEADLY_PHASES for phase in died) > 1:
        yield "two deaths, and it went on"
    if told.end == "engine_error" and not {*died} - {*HARMLESS_PHASES}:
        yield f"engine_error after {losses}: it has not killed two"


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens they begin with together."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def check_kv(workers: list[Worker]) -> None:
    """I4. Of every worker that ever was."""
    for worker in workers:
        if worker.runner.faults:
            raise Violation(f"I4: {worker.name}: {worker.runner.faults[0]}")


def check_forgotten(workers: list[Worker], request_id: str) -> None:
    """R4: a request whose client went a second ago is nowhere any more."""
    for worker in workers:
        if request_id in _known(worker):
            raise Violation(f"R4: {worker.name} still works on {request_id}")


def _known(worker: Worker) -> set[str]:
    stage, known = worker.stage, set(worker.landings._sites)
    if isinstance(stage, PrefillStage):
        known |= {request_id for request_id, _ in stage._live}
    if isinstance(stage, DecodeStage):
        known |= {sequence.request.id for sequence in (*stage._running, *stage._queue)}
    return known


def check_newest_serve(cluster: Cluster) -> None:
    """Of two starts under one name the newer one stays, at every gateway (fault matrix, row 22)."""
    newest = {worker.name: worker for worker in cluster.at.values()}  # in the order of their start
    for worker in newest.values():
        if worker.refused:
            raise Violation(f"{worker.label} was fenced in favour of an older start")
    there = {worker.name: worker.hello.peer for worker in cluster.workers}
    for worker in cluster.workers:
        if there[worker.name] != worker.hello.peer:
            raise Violation(f"{worker.label} is there beside a newer start")
    for gateway in cluster.gateways:
        for peer in {member.peer for member in gateway.pools.members} - {*there.values()}:
            raise Violation(f"{gateway.name} has {peer} and not the start that is there")


def check_nothing_left(cluster: Cluster) -> None:
    """I5, I7: once every request has ended and every lease is over."""
    for gateway in cluster.gateways:
        for what, count in _left_of_requests(gateway).items():
            raise Violation(f"I7: {count} {what} left at {gateway.name}")
    for worker in cluster.workers:
        check_ledger(worker)
        for what, count in _left_of_work(worker).items():
            raise Violation(f"I7: {count} {what} left on {worker.name}")
        if (sessions := len(worker.service._reports)) > len(cluster.gateways):
            raise Violation(f"I7: {worker.name} has {sessions} sessions")


def _left_of_requests(gateway: Gateway) -> Counter[str]:
    left = Counter(running=gateway.sequencer.running, waiting=gateway.sequencer.waiting)
    for member in gateway.pools.members:
        left["mailboxes"] += member.session.requests
    return +left


def _left_of_work(worker: Worker) -> Counter[str]:
    stage, landings = worker.stage, worker.landings
    left = Counter(
        landings=len(landings._sites) + len(landings._by_id),
        handoffs=len(worker.sender),
        unanswered=sum(link.unanswered for link in worker.receiver._links.values()),
    )
    if isinstance(stage, PrefillStage):
        left["sequences"] = len(stage._live) + len(stage._landings)
    if isinstance(stage, DecodeStage):
        left["sequences"] = len(stage._running) + len([*stage._queue])
        left["promises"] = len(stage._promised) + len(stage._started)
    return +left
