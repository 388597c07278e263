"""Pools: the workers that are there now. A membership lasts as long as its stream and its beats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.errors import BadRequest, HandshakeRefused
from cluster.messages import (
    BOTH,
    DECODE,
    PREFILL,
    PROTOCOL,
    Hello,
    Load,
    Order,
    Peer,
    Report,
    Request,
)
from cluster.metrics import WorkerView
from gateway import router
from gateway.pace import Reading
from gateway.router import PrefixMemory, View
from gateway.session import WorkerSession

log = logging.getLogger(__name__)

BEAT_S = 0.25
MISSED_BEATS = 5
"""A worker that says nothing for more than five beats of ours (1.25 to 1.5 s) is lost. Counting our
own beats keeps a gateway that was itself stopped from losing everyone when it wakes."""

TURNS = 16
"""Of our event loop before a beat counts: what has come while it was held up is heard first."""

PATIENCE_BEATS = 6
"""At most so many more for silence, one for each beat's time that ours have lately been late:
what starves us of the processor starves the workers beside us, and they are not lost. A beat more
is remembered, so that all of it holds for a few seconds."""

NEAR_BEATS = 4
"""Who comes back after so many was nearly lost, and for want of the processor, as likely as not: it
counts like our own being late."""

_ON_TIME_S = 0.1
"""A busy event loop is late by as much; one that waits for a processor is late by more."""

_FADES = 0.98
"""What is left after a beat of how late we were: nothing that counts after 25 s."""

QUIET_BEATS = 2

STILL_BEATS = 11
"""A worker whose step loop has not moved for eleven beats (2.75 to 3 s) hangs, whatever its
transport says: it counts within a step, and every tick of its timer while it is idle."""

SHUNNED_BEATS = 20
"""How long (5 s) a pair between which a transfer failed gets no request together."""

HELLO_S = 5.0

Connect = Callable[[str, AsyncIterator[Order]], AsyncIterator[Report]]


@dataclass(eq=False)
class Member:
    """One worker of one incarnation, from its join to its loss."""

    hello: Hello
    session: WorkerSession
    prefixes: PrefixMemory
    load: Load
    silent_beats: int = 0
    reports: int = 0  # of its session, at our last beat
    still_beats: int = 0
    stuck_at: int | None = None  # lost before for hanging here: not used until it has moved
    suspects: set[str] = field(default_factory=set)  # requests here that a worker died with
    sent_tokens: dict[str, int] = field(default_factory=dict)
    """Prompt tokens of requests sent since its last load, which that load cannot know of."""
    reading: Reading = field(default_factory=Reading)

    @property
    def peer(self) -> Peer:
        return self.hello.peer

    @property
    def lost_by(self) -> str:
        """Why a stream to it broke just now. A dead worker's breaks at once, a stopped or severed
        one's when its pings had no answer for longer than that."""
        return "silent" if self.silent_beats > QUIET_BEATS else "died"

    @property
    def usable(self) -> bool:
        """Whether new requests may go there."""
        return not self.load.draining and self.stuck_at is None

    @property
    def capacity(self) -> int:
        """Tokens that it can hold at once."""
        tokens = self.hello.blocks * self.hello.block_size
        return min(tokens, self.hello.max_model_len or tokens)

    def fits(self, request: Request) -> bool:
        """Whether there would be room if it had nothing else to do."""
        if self.hello.role == PREFILL:
            return len(request.tokens) <= self.capacity
        # The answer's last token needs no room: nothing is computed from it.
        return request.prompt_tokens + request.sampling.max_tokens - 1 <= self.capacity

    def view(self, marks: list[int]) -> View:
        load, hello = self.load, self.hello
        sent = sum(self.sent_tokens.values())
        return View(
            name=hello.peer.name,
            requests=self.session.requests,
            queued_tokens=load.queued_tokens + sent,
            total_blocks=hello.blocks,
            used_blocks=load.promised_blocks + load.owned_blocks + sent // max(1, hello.block_size),
            block_size=max(1, hello.block_size),
            cached_prefix=self.prefixes.hit(marks),
            speed=self.reading.speed,
        )

    def sent(self, request: Request, marks: list[int]) -> None:
        self.sent_tokens[request.id] = len(request.tokens)
        self.prefixes.remember(marks)


@dataclass(frozen=True, slots=True)
class Route:
    """The workers chosen for one attempt: a pair, or one that does it alone as `decode`."""

    prefill: Member | None
    decode: Member | None

    @property
    def fallback(self) -> bool:
        """Whether a decode worker has to read the prompt by itself (R10)."""
        return self.prefill is None and self.decode is not None and self.decode.hello.role == DECODE


class Pools:
    """Owned by the event loop. `model` is what workers must serve: its configuration's digest."""

    def __init__(self, model: str, config_digest: str, connect: Connect) -> None:
        self._model = model
        self._config_digest = config_digest
        self._connect = connect
        self._members: dict[str, Member] = {}
        self._sessions: dict[Member, asyncio.Task[None]] = {}  # a Peer may join twice
        self._stuck: dict[Peer, int] = {}
        self._shunned: dict[tuple[Peer, Peer], int] = {}  # pairs, with beats to go
        self._changed = asyncio.Event()
        self._listener: Callable[[], None] = lambda: None
        self._marked: tuple[Request, list[int]] | None = None
        self._draining = False
        self._late = 0.0  # seconds, of our own beats and of workers, lately

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    def join(self, hello: Hello) -> Member:
        """Take a worker in; an older start of it is lost. Raises HandshakeRefused."""
        self._check(hello)
        older = self._members.get(hello.peer.name)
        if older is not None:
            self.leave(older, "replaced")
        session = WorkerSession(
            hello.peer,
            lambda orders: self._connect(hello.control_address, orders),
            lambda: member.lost_by,
        )
        member = Member(
            hello=hello,
            session=session,
            prefixes=PrefixMemory(hello.blocks * hello.block_size),
            load=Load(progress=0, free_blocks=hello.blocks),
            stuck_at=self._stuck.pop(hello.peer, None),
        )
        self._members[hello.peer.name] = member
        task = asyncio.create_task(self._serve(member), name=f"session {hello.peer.name}")
        self._sessions[member] = task
        log.info("worker joined", extra={"worker": hello.peer.name, "role": hello.role})
        self._wake()
        return member

    def _check(self, hello: Hello) -> None:
        mine: list[tuple[str, object, object]] = [
            ("protocol", PROTOCOL, hello.protocol),
            ("model configuration", self._config_digest, hello.fingerprint.config),
        ]
        for other in self._members.values():
            if other.peer.name != hello.peer.name:
                mine.append(("weights", other.hello.fingerprint.weights, hello.fingerprint.weights))
                mine.append(("KV layout", other.hello.layout, hello.layout))
                break
        # None but one that is there, so that a clock that was set back shuts nobody out for long.
        there = self._members.get(hello.peer.name)
        if there is not None and there.peer.incarnation > hello.peer.incarnation:
            raise HandshakeRefused(
                f"a newer start of {hello.peer.name}, {there.peer.incarnation:016x}, is there and "
                f"this one is {hello.peer.incarnation:016x}: give one of them another --name"
            )
        for what, ours, theirs in mine:
            if ours != theirs:
                raise HandshakeRefused(
                    f"{what} of worker {hello.peer.name} is {theirs}, the cluster has {ours}"
                )

    async def _serve(self, member: Member) -> None:
        try:
            await member.session.run()
        except Exception:  # the top of a task that nobody awaits
            log.exception("session broke", extra={"worker": member.peer.name})
        finally:
            self.leave(member)

    def report(self, member: Member, load: Load) -> None:
        if load.progress != member.load.progress:
            member.still_beats = 0
        if load.progress != member.stuck_at:
            member.stuck_at = None
        member.load = load
        member.sent_tokens.clear()
        self._heard(member)
        self._wake()

    def _heard(self, member: Member) -> None:
        """A sign of life. One of a worker that was lost says that it was stopped, not starved."""
        if member.silent_beats >= NEAR_BEATS and member.session.lost is None:
            self._late = max(self._late, member.silent_beats * BEAT_S)
        member.silent_beats = 0

    def leave(self, member: Member, cause: str = "") -> None:
        """It is gone: whoever has a request there is told why. Idempotent."""
        member.session.close(cause or member.lost_by)
        task = self._sessions.pop(member, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        if self._members.get(member.peer.name) is member:
            del self._members[member.peer.name]
            log.info("worker left", extra={"worker": member.peer.name})
        self._wake()

    async def watch(self) -> None:
        """Lose workers that have fallen silent. Runs as long as the gateway."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + BEAT_S
            await asyncio.sleep(BEAT_S)
            late = _FADES * self._late + max(0.0, clock() - due - _ON_TIME_S)
            self._late = min(late, (PATIENCE_BEATS + 1) * BEAT_S)
            for _ in range(TURNS):
                await asyncio.sleep(0)
            for member in self.members:
                if member.reports != member.session.reports:
                    member.reports = member.session.reports
                    self._heard(member)
            patience = MISSED_BEATS + min(PATIENCE_BEATS, int(self._late / BEAT_S))
            for member in self.members:
                member.silent_beats += 1
                member.still_beats += 1
                if member.silent_beats > patience:
                    log.warning("worker fell silent", extra={"worker": member.peer.name})
                    self.leave(member, "silent")
                elif member.still_beats > STILL_BEATS:
                    log.warning("worker's step loop hangs", extra={"worker": member.peer.name})
                    self._stuck[member.peer] = member.load.progress
                    self.leave(member, "hung")
            self._shunned = {pair: left - 1 for pair, left in self._shunned.items() if left > 1}

    def drain(self) -> None:
        """This gateway is about to end: it is no longer ready, though what runs goes on."""
        self._draining = True
        self._wake()

    async def close(self) -> None:
        for member in self.members:
            self.leave(member)

    async def changed(self, timeout: float) -> None:
        """Returns when any worker's state may have changed. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            await self._changed.wait()

    def listen(self, listener: Callable[[], None]) -> None:
        """Whom to call when any worker's state may have changed."""
        self._listener = listener

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._listener()

    def shun(self, route: Route) -> None:
        """A transfer between these two failed: for a while they get nothing together, though each
        may be fine with others."""
        if route.prefill is not None and route.decode is not None:
            self._shunned[route.prefill.peer, route.decode.peer] = SHUNNED_BEATS

    def route(
        self,
        request: Request,
        avoid: Collection[Peer] = (),
        keep: Member | None = None,
        *,
        paced: bool = False,
        apart: bool = False,
    ) -> Route | None:
        """The best pair, else the best `both` worker, else a decode worker alone. None: nobody can.

        `keep` is the decode worker, if there is one already. `paced`: none that has enough to read
        for now. `apart`: rather none with a suspect. Raises BadRequest for a request that is
        larger than every worker.
        """
        self._check_size(request)
        open_to = [m for m in self.members if m.usable and m.fits(request) and m.peer not in avoid]
        if keep is not None:
            open_to = [m for m in open_to if m is keep or m.hello.role == PREFILL]
        of = {
            role: [m for m in open_to if m.hello.role == role] for role in (PREFILL, DECODE, BOTH)
        }
        if apart:
            of = {role: [m for m in of[role] if not m.suspects] or of[role] for role in of}
        free = {
            role: [m for m in of[role] if not paced or m.reading.takes(len(request.tokens))]
            for role in of
        }
        if not any(free.values()):
            return None
        if self._marked is None or self._marked[0] is not request:  # one is asked for repeatedly
            self._marked = request, router.prefix_marks(request)
        marks = self._marked[1]
        route = self._pair(request, marks, free[PREFILL], of[DECODE]) or _alone(
            _cheapest(router.choose_prefill, free[BOTH], request, marks)
        )
        if route is None and not (of[BOTH] or self._pair(request, marks, of[PREFILL], of[DECODE])):
            route = _alone(_cheapest(router.choose_decode, free[DECODE], request, marks))
        for member in (route.prefill, route.decode) if route is not None else ():
            if member is not None:
                member.sent(request, marks)
        return route

    def _pair(
        self, request: Request, marks: list[int], prefills: list[Member], decodes: list[Member]
    ) -> Route | None:
        """The best prefill worker that has somebody to hand over to."""
        while prefill := _cheapest(router.choose_prefill, prefills, request, marks):
            if request.sampling.max_tokens - request.emitted == 1:
                return Route(prefill, None)  # one token needs no landing
            partners = [d for d in decodes if (prefill.peer, d.peer) not in self._shunned]
            if decode := _cheapest(router.choose_decode, partners, request, marks):
                return Route(prefill, decode)
            prefills = [member for member in prefills if member is not prefill]
        return None

    def capacity(self) -> int | None:
        """The longest prompt with answer that some worker has room for; None without workers."""
        deciding = (m.capacity for m in self.members if m.hello.role != PREFILL)
        return max(deciding, default=None)

    def _check_size(self, request: Request) -> None:
        present = {member.hello.role for member in self.members}
        fitting = {member.hello.role for member in self.members if member.fits(request)}
        if _can_answer(present) and not _can_answer(fitting):
            raise BadRequest(
                "The prompt and max_tokens do not fit into this server's KV cache.",
                code="prompt_too_large_for_server",
            )

    def ready(self) -> bool:
        """Somebody can answer, and this gateway takes requests."""
        return not self._draining and self.staffed()

    def staffed(self) -> bool:
        """Somebody can answer: without a prefill worker a decode worker does it all."""
        return _can_answer({member.hello.role for member in self.members if member.usable})

    def readers(self) -> list[Member]:
        """Those who read prompts now."""
        usable = [member for member in self.members if member.usable]
        for role in (PREFILL, BOTH, DECODE):
            if found := [member for member in usable if member.hello.role == role]:
                return found
        return []

    def views(self) -> list[WorkerView]:
        """The workers as the metrics show them."""
        return [
            WorkerView(m.peer.name, m.hello.role, m.hello.block_size, m.hello.blocks, m.load)
            for m in self.members
        ]

    def status(self) -> dict[str, Any]:
        """The cluster as JSON."""
        return {
            "model": self._model,
            "ready": self.ready(),
            "workers": [
                {
                    "name": member.peer.name,
                    "role": member.hello.role,
                    "incarnation": f"{member.peer.incarnation:016x}",
                    "control_address": member.hello.control_address,
                    "data_address": member.hello.data_address,
                    "block_size": member.hello.block_size,
                    "blocks": member.hello.blocks,
                    "requests": member.session.requests,
                    **{k: v for k, v in asdict(member.load).items() if k != "counters"},
                }
                for member in sorted(self.members, key=lambda m: (m.hello.role, m.peer.name))
            ],
        }


def _can_answer(roles: set[str]) -> bool:
    """A decode worker does without a prefill worker if it has to (R10)."""
    return BOTH in roles or DECODE in roles


def _cheapest(
    choose: Callable[[Iterable[View], int], View | None],
    members: list[Member],
    request: Request,
    marks: list[int],
) -> Member | None:
    """The member whose view the router chooses."""
    named = {member.peer.name: member for member in members}
    view = choose([member.view(marks) for member in members], len(request.tokens))
    return None if view is None else named[view.name]


def _alone(member: Member | None) -> Route | None:
    return None if member is None else Route(None, member)


async def serve_membership(
    pools: Pools, messages: AsyncIterator[Hello | Load], name: str
) -> AsyncGenerator[str, None]:
    """The Registry's Join for one worker. Raises HandshakeRefused."""
    hello: Hello | Load | None = None
    with suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(HELLO_S):
            hello = await anext(messages)
    if not isinstance(hello, Hello):
        raise HandshakeRefused(f"the first message must be a Hello, within {HELLO_S:g} s")
    member = pools.join(hello)
    try:
        yield name
        async for load in messages:
            if isinstance(load, Load):
                pools.report(member, load)
            if member.session.lost:
                return
    finally:
        pools.leave(member)
