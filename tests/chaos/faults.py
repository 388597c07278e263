"""Faults: what may happen to a simulated cluster, and at which message it happens.

    process   crash, stop, stall, hang, drain, replace, raise       of an end of the message's line
              gateway                                               dies with all its clients
    network   sever, sever_one_way, reset, unjoin                   between two processes
    frame     frame_lost, frame_repeated, frame_late, frame_flipped, frame_cut
    control   order_repeated, held                                  gRPC is reliable and ordered:
              order_lost                                            this would be a bug of our own

The k-th message is the same one in every run of a scenario, so `Blow(k, kind)` is one exact event.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from kvtransfer.frames import BadFrame, decode
from tests.cluster_in_process import Cluster, Gateway, Worker
from tests.lines import Line, Membership
from tests.virtual import clock

PROCESS = ("crash", "stop", "stall", "hang", "drain", "replace", "raise", "gateway")
NETWORK = ("sever", "sever_one_way", "reset", "unjoin")
FRAME = ("frame_lost", "frame_repeated", "frame_late", "frame_flipped", "frame_cut")
CONTROL = ("order_repeated", "held")
SILENT = ("order_lost",)

REPEATING = ("frame_repeated", "order_repeated")
HARMLESS = ("stall", "held", "frame_repeated")
"""Nobody may be lost because of these, and no request may have to recover."""

LATEST_S = 12.0
"""So late a message may come once more."""

DATA = ("frame", "answer")
COUNTED = ("order", "report", *DATA)
"""Lines whose messages are numbered; beats come whether requests run or not."""


@dataclass(frozen=True, slots=True)
class Blow:
    """One fault at one message."""

    at: int
    kind: str


class Faults:
    """Strikes one cluster. `rates` are chances by kind, for every message on its own."""

    def __init__(
        self,
        cluster: Cluster,
        seed: int,
        blows: Iterable[Blow],
        rates: dict[str, float],
        verbose: bool = False,
    ) -> None:
        self.messages = 0
        self.kinds: list[str] = []  # of the counted messages' lines
        self.struck: Counter[str] = Counter()
        self.log: list[str] = []
        self.over = False
        self._cluster = cluster
        self._random = Random(f"faults of {seed}")
        self._blows: dict[int, list[str]] = defaultdict(list)
        for blow in blows:
            self._blows[blow.at].append(blow.kind)
        self._rates = rates
        self._verbose = verbose
        self._slots: dict[str, tuple[str, dict[str, Any]]] = {}
        self._chores: list[asyncio.Task[None]] = []

    def add(self, role: str, name: str, **options: Any) -> Worker:
        """A worker of the cluster's full strength: `heal` starts it again if it is not there."""
        self._slots[name] = role, options
        return self._cluster.add(role, name, **options)

    def fate(self, line: Line, item: Any) -> list[tuple[Any, float]]:
        """In place of Cluster.fate."""
        arrives = [(item, 0.0)]
        if line.kind not in COUNTED:
            return arrives
        way = f"{line.source.label} -> {line.target.label}"
        if self.over:
            self._say(f"healed  {way}: {brief(item)}" if self._verbose else "")
            return arrives
        self.messages += 1
        self.kinds.append(line.kind)
        struck = [kind for kind in self._blows.get(self.messages, ()) if applies(kind, line.kind)]
        for kind, chance in self._rates.items():
            if applies(kind, line.kind) and self._random.random() < chance:
                struck.append(kind)
        for kind in struck:
            self.struck[kind] += 1
            if kind in PROCESS or kind in NETWORK:
                self._strike(kind, line)
            else:
                arrives = self._tamper(kind, line, item)
        if self._verbose:
            self._say(f"#{self.messages}  {way}: {brief(item)}", struck)
        return arrives

    @property
    def settled_after(self) -> float:
        """How long after `heal` something of it may still happen: links that lost a frame notice
        within a lease, and what was repeated has come."""
        return LATEST_S + 1.0 if self.struck.keys() & {*REPEATING} else 5.0

    def heal(self) -> None:
        """No more faults; everything that was there at first is there again."""
        self.over = True
        self._cluster.severed.clear()
        for worker in self._cluster.workers:
            if worker.leaving:
                worker.crash()
            worker.thaw()
            worker.hung = worker.runner.explode = False
        self.supervise()
        for slot, gateway in enumerate(self._cluster.gateways):
            if not gateway.alive:
                self._cluster.gateways[slot] = self._cluster.gateway(gateway.name)

    def supervise(self) -> None:
        """As a launcher: whatever has ended is started again."""
        for name in self._slots:
            self._start(name)

    # Of a message: what arrives instead of it.

    def _tamper(self, kind: str, line: Line, item: Any) -> list[tuple[Any, float]]:
        random = self._random
        match kind:
            case "frame_lost" | "order_lost":
                return []
            case "frame_repeated" | "order_repeated":
                late = [
                    (item, self._some_time(0.001, LATEST_S)) for _ in range(random.choice([1, 2]))
                ]
                return [(item, 0.0), *late]
            case "frame_late":
                return [(item, self._some_time(0.001, 6.0))]
            case "frame_flipped":
                return [(_flipped(item, random), 0.0)]
            case "frame_cut":
                return [(_cut(item, random), 0.0)]
        assert kind == "held"
        line.hold(self._some_time(0.001, 0.45))
        return [(item, 0.0)]

    # Of processes and what lies between them.

    def _strike(self, kind: str, line: Line) -> None:
        random, cluster = self._random, self._cluster
        gateways = [end for end in (line.source, line.target) if isinstance(end, Gateway)]
        ends = [end for end in (line.source, line.target) if isinstance(end, Worker)]
        worker = random.choice(ends if random.random() < 0.8 else cluster.workers or ends)
        match kind:
            case "crash":
                self._soon(lambda: self._crash(worker))
            case "stop":
                self._for(self._some_time(0.6, 6.0), worker.freeze, worker.thaw)
            case "stall":
                self._for(self._some_time(0.05, 0.45), worker.freeze, worker.thaw)
            case "hang":
                self._for(self._some_time(0.2, 8.0), lambda: _hang(worker), lambda: _move(worker))
            case "raise":
                self._for(0.05, lambda: _break(worker), lambda: _move(worker))
            case "drain":
                self._drain(worker)
            case "replace":
                role, options = self._slots[worker.name]
                self._soon(lambda: cluster.add(role, worker.name, **options))
            case "gateway":
                slot = random.randrange(len(cluster.gateways))
                self._soon(lambda: self._lose_gateway(slot))
            case "sever" | "sever_one_way":
                one, other = random.sample([line.source, line.target], 2)
                if random.random() < 0.2 and gateways:
                    one, other = random.choice(gateways), worker
                both = kind == "sever"
                self._for(
                    self._some_time(0.1, 8.0),
                    lambda: cluster.sever(one, other, both),
                    lambda: cluster.heal(one, other),
                )
            case "reset":
                assert line.connection is not None
                self._soon(line.connection.fail)
            case "unjoin":
                joined = [c for c in cluster.connections if isinstance(c, Membership)]
                if joined:
                    self._soon(random.choice(joined).fail)

    def _crash(self, worker: Worker) -> None:
        if not worker.alive or self.over:
            return
        self._say(f"{worker.name} crashes")
        worker.crash()
        self._maybe_later(lambda: self._start(worker.name))

    def _drain(self, worker: Worker) -> None:
        self._say(f"{worker.name} drains")

        async def drain() -> None:
            await worker.drain(limit)
            self._maybe_later(lambda: self._start(worker.name))

        limit = self._some_time(0.05, 20.0)
        self._chores.append(asyncio.create_task(drain()))

    def _start(self, name: str) -> None:
        """Unless one of that name runs and will go on doing so."""
        role, options = self._slots[name]
        if not any(w.name == name and not w.leaving for w in self._cluster.workers):
            self._say(f"{name} starts")
            self._cluster.add(role, name, **options)

    def _lose_gateway(self, slot: int) -> None:
        gateway = self._cluster.gateways[slot]
        if not gateway.alive or self.over:
            return
        self._say(f"{gateway.name} dies")
        gateway.crash()

        def back() -> None:
            if not self._cluster.gateways[slot].alive:
                self._cluster.gateways[slot] = self._cluster.gateway(gateway.name)

        self._maybe_later(back)

    # When.

    def _some_time(self, least: float, most: float) -> float:
        """Short times as likely as long ones."""
        return float(least * (most / least) ** self._random.random())

    def _soon(self, act: Callable[[], object]) -> None:
        """Before the message arrives, or a little after."""
        wait = self._random.choice([0.0, self._some_time(0.0005, 0.05)])
        self._later(wait, act)

    def _for(self, seconds: float, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._soon(begin)
        self._later(seconds + 0.06, end)

    def _maybe_later(self, act: Callable[[], None]) -> None:
        wait = self._some_time(0.05, 8.0)
        if self._random.random() < 0.8:
            self._later(wait, act)

    def _later(self, wait: float, act: Callable[[], object]) -> None:
        def unless_over() -> None:
            if not self.over:
                act()

        asyncio.get_running_loop().call_later(wait, unless_over)

    def _say(self, what: str, struck: list[str] | None = None) -> None:
        if self._verbose:
            note = f"   <-- {', '.join(struck)}" if struck else ""
            self.log.append(f"{clock():9.4f}  {what}{note}")


def applies(kind: str, line: str) -> bool:
    """Whether this fault can befall a message of a line of that kind."""
    if kind in FRAME:
        return line in DATA
    if kind in CONTROL or kind in SILENT:
        return line in ("order", "report")
    return kind != "drain" or line in ("order", "report")


def brief(item: Any) -> str:
    """One message on one line."""
    if isinstance(item, list):
        try:
            frame = decode(item)
        except BadFrame as error:
            return str(error)
        return f"{frame.serial} {frame.fields}"
    return repr(item)


def _flipped(parts: list[bytes], random: Random) -> list[bytes]:
    """One to three bits."""
    changed = [bytearray(part) for part in parts]
    for _ in range(random.choice([1, 1, 3])):
        part = random.choice([part for part in changed if part])
        part[random.randrange(len(part))] ^= 1 << random.randrange(8)
    return [bytes(part) for part in changed]


def _cut(parts: list[bytes], random: Random) -> list[bytes]:
    """Shorter, or with a part missing or too many."""
    which = random.randrange(4)
    if which == 0:
        return parts[: random.randrange(len(parts))]
    if which == 1:
        return [*parts, b"more"]
    part = random.choice([number for number, part in enumerate(parts) if part])
    return [
        bytes(p[: random.randrange(len(p))]) if number == part else p
        for number, p in enumerate(parts)
    ]


def _hang(worker: Worker) -> None:
    worker.hung = True


def _break(worker: Worker) -> None:
    worker.runner.explode = True


def _move(worker: Worker) -> None:
    worker.hung = worker.runner.explode = False
