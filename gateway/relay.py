"""Relay: one answer's account, from its first attempt to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NoReturn

from cluster.clock import monotonic
from cluster.errors import BadRequest, BatonError, EngineFailed, TokenLost, TransferFailed
from cluster.lifecycle import Phase, advance
from cluster.messages import Cancel, Event, Failed, Peer, Request, Token
from gateway.admission import Seat
from gateway.pools import Member, Route
from gateway.recovery import GivenBack, Losses
from gateway.session import Mailbox


@dataclass(slots=True)
class Recovery:
    """One loss that the client saw as a pause. `seconds` run from its being noticed to the next
    token; 0 until that comes."""

    phase: str
    cause: str  # gateway.recovery
    seconds: float = 0.0


@dataclass
class Watch:
    """What one request went through; filled while it runs, read by its response and the metrics.

    `spans` are seconds by phase on this gateway's clock (R9). Up to the first token they add up to
    TTFT: recovery (all that was before the last loss), queue, landing, prefill_queue, prefill,
    wire. Between first and second token they add up to that gap: transfer_tail, decode_admit,
    first_step, wire_second. What was lost later is in `recoveries` alone.
    """

    arrived: float = field(default_factory=monotonic)
    spans: dict[str, float] = field(default_factory=dict)
    prefill_worker: str = ""
    decode_worker: str = ""
    cached_tokens: int = 0
    fallback: bool = False  # a decode worker read the prompt, for want of a prefill worker (R10)
    recoveries: list[Recovery] = field(default_factory=list)


class Relay:
    """Every message about an older attempt, or out of order, is a no-op (R6)."""

    def __init__(self, request: Request, watch: Watch, seat: Seat) -> None:
        self.request = request
        self.watch = watch
        self.seat = seat
        self.phase = Phase.QUEUED
        self.attempt = 0
        self.emitted = list(request.tokens[request.prompt_tokens :])
        self.mailbox = Mailbox()
        self.route = Route(None, None)
        self.avoid: set[Peer] = set()  # where a step with it raised
        self.keep: Member | None = None  # its landing waits for another prefill worker
        self.losses = Losses()
        self.lost_at: float | None = None  # until the next token
        self.handed_at = 0.0
        self._members: list[Member] = []
        self._given = len(request.tokens)

    @property
    def first(self) -> bool:
        """Whether nothing was lost since a token was there."""
        return len(self.request.tokens) == self._given

    def begin(self, route: Route) -> None:
        """The next attempt. What earlier ones asked of others than a kept decode worker is off."""
        self.release(self.keep)
        self.attempt += 1
        self.route = route

    def involve(self, member: Member) -> None:
        """From now on this worker's events about the request come here. Raises WorkerLost."""
        member.session.listen(self.request.id, self.mailbox)
        if member not in self._members:
            self._members.append(member)
        if self.losses.suspect:
            member.suspects.add(self.request.id)

    def dismiss(self, member: Member) -> None:
        """It has done its part: what happens to it no longer concerns the request."""
        member.session.forget(self.request.id)
        member.suspects.discard(self.request.id)
        self._members.remove(member)

    def release(self, keep: Member | None = None) -> None:
        """Cancel on every worker involved but one. Idempotent, in every phase (R4)."""
        for member in [m for m in self._members if m is not keep]:
            member.session.send(Cancel(self.request.id, self.attempt))
            self.dismiss(member)
        self.mailbox = Mailbox()

    def lose(self, error: BatonError, now: float) -> str:
        """Back to the queue, to go on from what the client has. Returns the cause. Raises what ends
        the answer."""
        cause = self.losses.count(error, self._computed_by(error))
        prefill, decode = self.route.prefill, self.route.decode
        self.keep = None
        if self.phase is Phase.PREFILLING and prefill and error is prefill.session.lost:
            self.keep = decode
        if cause == "engine":
            blamed = prefill if prefill and self.phase is Phase.PREFILLING else decode
            if blamed is not None:
                self.avoid.add(blamed.peer)
        prompt = self.request.tokens[: self.request.prompt_tokens]
        tokens = (*prompt, *self.emitted)
        self.request = replace(self.request, tokens=tokens, emitted=len(self.emitted))
        self.watch.recoveries.append(Recovery(self.phase.value, cause))
        if self.lost_at is None:
            self.lost_at = now
        if self.first:
            self.watch.spans["recovery"] = now - self.watch.arrived
        if self.phase is not Phase.QUEUED:
            self.to(Phase.QUEUED)
        return cause

    def _computed_by(self, error: BatonError) -> bool:
        """Whether whoever was lost with this error may have computed something of it."""
        prefill, decode = self.route.prefill, self.route.decode
        if self.phase is Phase.PREFILLING and prefill and decode:
            return error is not decode.session.lost
        return self.phase not in (Phase.QUEUED, Phase.PROMISING)

    async def next_event(self) -> Event:
        """The next event of the current attempt. Raises what befell it."""
        while (event := self._take()) is None:
            await self.mailbox.filled()
        return event

    async def next_token(self) -> Token:
        """The token that follows what the client has. Raises what befell the attempt."""
        while True:
            event = self._take()
            if event is None:
                await self.mailbox.filled()
            elif isinstance(event, Failed):
                fail(event)
            elif isinstance(event, Token) and event.index >= len(self.emitted):
                return self.accept(event)

    def accept(self, token: Token) -> Token:
        """Take it as the next one. Raises TokenLost."""
        if token.index != len(self.emitted):
            raise TokenLost("A token of this answer got lost. Please try again.")
        self.emitted.append(token.token)
        return token

    def span(self, phase: str, seconds: float) -> None:
        """The timeline is of the attempt that brought the first two tokens."""
        if self.first:
            self.watch.spans[phase] = seconds

    def note(self, token: Token, elapsed: float, rest: str) -> None:
        """Add the worker's own durations; what they leave of the elapsed time is `rest`."""
        for phase, seconds in token.spans:
            self.span(phase, seconds)
        self.span(rest, max(0.0, elapsed - sum(seconds for _, seconds in token.spans)))

    def _take(self) -> Event | None:
        """What is there now of the current attempt. Raises what befell it."""
        while (mail := self.mailbox.take()) is not None:
            if isinstance(mail, BatonError):
                raise mail
            if mail.attempt == self.attempt:
                return mail
        return None

    def to(self, phase: Phase) -> None:
        self.phase = advance(self.phase, phase)


def fail(failed: Failed) -> NoReturn:
    match failed.code:
        case "too_large":
            raise BadRequest(
                "The prompt and max_tokens do not fit into this server's KV cache.",
                code="prompt_too_large_for_server",
                param="prompt",
            )
        case "transfer_failed" | "lease_expired":
            raise TransferFailed("The prompt's KV cache did not arrive whole. Please try again.")
        case "given_back":
            raise GivenBack("The worker of this request ended. Please try again.")
    raise EngineFailed("The engine could not complete this request.")
