"""Life: one run of one scenario on virtual time, from the first worker to the last check.

clients and faults -> heal -> the same questions again -> nothing is held -> History
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.errors import BatonError
from gateway.relay import Watch
from tests.chaos.faults import HARMLESS, Faults
from tests.chaos.history import (
    FINISHED,
    History,
    Told,
    Violation,
    check_forgotten,
    check_kv,
    check_newest_serve,
    check_nothing_left,
)
from tests.chaos.scenario import CALM, LONG_S, ROUGH, Client, Scenario
from tests.cluster_in_process import Cluster
from tests.virtual import clock, run

LIMIT_S = 400.0
"""Virtual seconds within which a life must be over (I9)."""
REJOIN_WITHIN_S = 20.0
FREE_WITHIN_S = 12.0
"""After the last request: the longest lease and some slack (I5)."""
CANCEL_S = 1.0
"""R4: after that nothing of a request is left whose client has gone."""
PAUSE_S = 6.0
"""The longest that one fault may make a client wait: four seconds until a lost frame is noticed, on
the longest lease, and the way back."""
PROBES = 2


@dataclass
class Tally:
    """What happened, of one life or of many."""

    lives: int = 0
    messages: int = 0
    virtual_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: Counter[str] = field(default_factory=Counter)  # phase and cause
    ends: Counter[str] = field(default_factory=Counter)
    pauses: list[float] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)  # which scenario, and what of it

    def add(self, other: Tally) -> None:
        self.lives += other.lives
        self.messages += other.messages
        self.virtual_s += other.virtual_s
        self.faults += other.faults
        self.recoveries += other.recoveries
        self.ends += other.ends
        self.pauses += other.pauses
        self.failed += other.failed

    @classmethod
    def read(cls, said: dict[str, Any]) -> Tally:
        """From the JSON of another process."""
        for name in ("faults", "recoveries", "ends"):
            said[name] = Counter(said[name])
        return cls(**said)


class Life:
    """One run of one scenario."""

    def __init__(self, scenario: Scenario, verbose: bool = False) -> None:
        self.scenario = scenario
        self.history = History()
        self.cluster = Cluster(scenario.seed, delay_s=scenario.delay_s, gateways=scenario.gateways)
        self.cluster.ahead = scenario.ahead
        self.faults = Faults(self.cluster, scenario.seed, scenario.blows, scenario.rates, verbose)
        self.cluster.fate = self.faults.fate  # type: ignore[method-assign]
        self._noise: list[str] = []

    def live(self) -> Tally:
        """Raises Violation."""
        listener = _Listener(self._noise)
        root = logging.getLogger()
        level, root.level = root.level, logging.WARNING
        root.addHandler(listener)
        try:
            lasted = run(self._all(), LIMIT_S)
        except TimeoutError:
            raise Violation(f"I9: not over after {LIMIT_S:g} s") from None
        finally:
            root.removeHandler(listener)
            root.level = level
        for line in self._noise:
            raise Violation(line)
        return self._tally(lasted)

    async def _all(self) -> float:
        asyncio.get_running_loop().set_exception_handler(self._broke)
        scenario, cluster = self.scenario, self.cluster
        async with cluster:
            for worker in scenario.workers:
                self.faults.add(worker.role, worker.name, **worker.options)
            await cluster.joined(len(scenario.workers))
            await asyncio.gather(*(self._client(client) for client in scenario.clients))
            await self._heal()
            check_kv(list(cluster.at.values()))
            check_newest_serve(cluster)
            self._check()
        return clock()

    async def _client(self, client: Client) -> None:
        await asyncio.sleep(client.at)
        gateway = self.cluster.gateways[client.gateway]
        now = clock()
        watch = Watch(arrived=now)
        told = Told(client.request, gateway.name, now, now + client.deadline, watch)
        self.history.told.append(told)
        if gateway.alive:
            asking = asyncio.create_task(self._ask(client, told))
            gateway.asking[asking] = None
            await asyncio.wait([asking])
            gateway.asking.pop(asking)
            if asking.cancelled():
                told.ends.append("gateway died")
            else:
                asking.result()
        else:
            told.ends.append("unreachable")
        told.ended = clock()
        if told.end == "gone":
            await asyncio.sleep(CANCEL_S)
            if not self.faults.struck:
                check_forgotten(self.cluster.workers, told.request.id)

    async def _ask(self, client: Client, told: Told) -> None:
        sequencer = self.cluster.gateways[client.gateway].sequencer
        answer = sequencer.answer(client.request, told.watch)
        gives_up = client.gives_up or client.deadline
        try:
            async with asyncio.timeout(gives_up), aclosing(answer):
                async for token in answer:
                    told.tokens.append(token)
                    told.times.append(clock())
                    if client.pause and not token.finish:
                        await asyncio.sleep(client.pause)
        except TimeoutError:
            told.ends.append("gone" if client.gives_up else "deadline")
        except BatonError as error:
            told.ends.append(error.code)
        else:
            told.ends.append(told.tokens[-1].finish if told.tokens else "")

    async def _heal(self) -> None:
        """Everything is there again; every gateway answers, from caches old and new, as ever."""
        self.faults.heal()
        for gateway in self.cluster.gateways:
            try:
                async with asyncio.timeout(REJOIN_WITHIN_S):
                    while not self._complete(gateway.pools.members):
                        await gateway.pools.changed(timeout=REJOIN_WITHIN_S)
                        self.faults.supervise()  # who was refused for a newer start has ended
            except TimeoutError:
                raise Violation(f"{gateway.name} did not get all of its workers back") from None
        probes = [client for client in self.scenario.clients if client.gives_up is None][:PROBES]
        await asyncio.sleep(self.faults.settled_after)
        before = len(self.history.told)
        await asyncio.gather(
            *(
                self._client(_again(client, number))
                for number in range(self.scenario.gateways)
                for client in probes
            )
        )
        for told in self.history.told[before:]:
            if told.end not in FINISHED or told.causes:
                raise Violation(f"not healed: {told.request.id} {told.end} after {told.causes}")
        try:
            await self.cluster.idle(FREE_WITHIN_S)
        except AssertionError as error:
            raise Violation(f"I5: {error}") from None
        await asyncio.sleep(0.5)  # what was on its way has arrived
        check_nothing_left(self.cluster)

    def _complete(self, members: list[Any]) -> bool:
        usable = {member.peer.name for member in members if member.usable}
        return usable == {worker.name for worker in self.scenario.workers}

    def _check(self) -> None:
        self.history.check()
        struck = set(self.faults.struck)
        if self.scenario.level != ROUGH:
            self.history.check_everyone_finished()
            self.history.check_pauses(PAUSE_S)
        if self.scenario.level == CALM or (self.scenario.level != ROUGH and struck <= {*HARMLESS}):
            self.history.check_nobody_recovered()

    def _tally(self, lasted: float) -> Tally:
        told = self.history.told
        recoveries = [recovery for one in told for recovery in one.watch.recoveries]
        return Tally(
            1,
            self.faults.messages,
            lasted,
            +self.faults.struck,
            Counter(f"{recovery.phase} {recovery.cause}" for recovery in recoveries),
            Counter(one.end for one in told),
            [one.pause for one in told if one.causes],
        )

    def _broke(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._noise.append(f"{context['message']}: {context.get('exception')!r}")


class _Listener(logging.Handler):
    """Whatever is logged as an error is one, but for the step that was made to raise."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "step failed" and "on fire" in str(record.exc_info):
            return
        self._heard.append(f"logged: {record.getMessage()} {record.exc_info}")


def _again(client: Client, gateway: int) -> Client:
    name = f"probe {client.request.id} at {gateway}"
    request = replace(client.request, id=name)
    return Client(request, gateway, 0.0, 0.0, None, LONG_S)


def live(scenario: Scenario) -> Tally:
    """One life. What it violated is in `failed`."""
    try:
        return Life(scenario).live()
    except Exception as error:  # whatever it is, the seed is what matters
        return Tally(lives=1, failed=[(scenario.name, f"{type(error).__name__}: {error}")])
