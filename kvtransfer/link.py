"""Link: what carries the bytes to one worker. Any transport that passes the contract tests will do.

`FramedLink` is all of a link but the transport: handshake, serials, credit, resending, deadlines.
A transport that moves parts in order needs only the few lines of a `Wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from cluster.errors import BatonError, HandshakeRefused, TransferFailed, WorkerLost
from cluster.messages import Hello, Peer
from cluster.wire.codec import decode_hello, encode_hello
from kvtransfer.frames import (
    Ack,
    BadFrame,
    Buffer,
    Bye,
    Chunk,
    Fields,
    Frame,
    Greeting,
    Manifest,
    Nack,
    Refuse,
    Reject,
    Renew,
    Sealed,
    Welcome,
    decode,
    digest_of,
    encode,
)

ANSWER_TIMEOUT_S = 5.0
"""How long a link waits for an answer where its maker names no time. A peer that is alive answers
between two of its steps, so the right time is the lease of a landing there: while a step lasts
longer than that, the landing is lost anyway."""
RESENDS = 2
"""How often a body that arrived damaged is sent again."""


class Link(Protocol):
    """Moves KV to one start of one worker, for any number of handoffs at once.

    Every verb has a deadline. Every verb but `close` raises WorkerLost once the link is lost, as it
    is when the peer dies, restarts or falls silent; a lost link stays lost.
    """

    @property
    def lost(self) -> bool: ...

    @property
    def credit(self) -> int:
        """Bytes of chunks that may be under way, and so the most that one may have; once open."""

    @property
    def resent(self) -> int:
        """How many chunks were sent again because they had arrived damaged."""

    async def open(self) -> None:
        """Connect and shake hands; on an open link nothing. Raises HandshakeRefused."""

    async def send(self, chunk: Chunk, size: int, read: Callable[[], Buffer]) -> int:
        """Returns once the peer has written the chunk: the digest of its body.

        Waits for credit, then calls `read` for the body of `size` bytes, in the caller's task, so
        never after the caller was cancelled; the link keeps the body no longer than its answer
        takes. Raises TransferFailed when the peer rejects it or it keeps arriving damaged.
        """

    async def renew(self, renew: Renew) -> None:
        """Keep the landing's lease alive. Raises TransferFailed if the landing is gone."""

    async def seal(self, manifest: Manifest) -> None:
        """Returns once the landing is sealed. Raises TransferFailed."""

    def close(self) -> None:
        """Nothing moves afterwards; whoever waits gets WorkerLost. May be called again."""


class Wire(Protocol):
    """A transport's end of a link: moves frames' parts to one peer in order, until it is lost."""

    async def open(
        self, received: Callable[[list[Buffer]], None], lost: Callable[[str], None]
    ) -> None:
        """Connect. Then `received` gets every message and `lost`, at most once, the bad news."""

    def send(self, parts: tuple[Buffer, Buffer]) -> None:
        """Never waits: what may be under way is bounded by credit. Raises WorkerLost."""

    def close(self) -> None:
        """May be called again, and before `open`."""


class Credit:
    """Bytes that may be under way, handed out first come, first served."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Waits until `size` bytes are free. Raises what `fail` was called with."""
        assert size <= self.total, f"{size} bytes asked of {self.total} in all"
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None:
                self.give(size)  # had been served in the same breath
            self._serve()
            raise

    def give(self, size: int) -> None:
        self.free += size
        assert self.free <= self.total, "more credit given back than taken"
        self._serve()

    def fail(self, error: Exception) -> None:
        """Nobody waiting will be served any more."""
        for _, turn in self._waiting:
            if not turn.done():
                turn.set_exception(error)
        self._waiting.clear()

    def _serve(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done():
                if size > self.free:
                    return
                self.free -= size
                turn.set_result(None)
            self._waiting.popleft()


@dataclass(frozen=True, slots=True)
class _Question:
    answered: asyncio.Future[Frame]
    size: int  # bytes of credit that come back with the answer
    deadline: asyncio.TimerHandle


class FramedLink:
    """A Link over any Wire. Belongs to the event loop.

    One question that is not answered within `answer_timeout` seconds loses the link, and with it
    every handoff that uses it.
    """

    def __init__(
        self,
        wire: Wire,
        hello: Hello,
        peer: Peer,
        *,
        open_timeout: float = 2.0,
        answer_timeout: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self.peer = peer
        self.resent = 0
        self._wire = wire
        self._hello = hello
        self._open_timeout = open_timeout
        self._answer_timeout = answer_timeout
        self._opening: asyncio.Task[None] | None = None
        self._credit: Credit | None = None  # known once welcomed
        self._serials = count(1)
        self._asked: dict[int, _Question] = {}
        self._ended: tuple[type[BatonError], str] | None = None

    @property
    def lost(self) -> bool:
        return self._ended is not None

    @property
    def credit(self) -> int:
        return self._opened().total

    async def open(self) -> None:
        if self._opening is None:
            self._opening = asyncio.create_task(self._greet())
        # Not awaited itself: the handshake is everybody's, and goes on if this caller is cancelled.
        await asyncio.wait([self._opening])
        self._check()

    async def send(self, chunk: Chunk, size: int, read: Callable[[], Buffer]) -> int:
        credit = self._opened()
        if size > credit.total:
            raise TransferFailed(f"{size} bytes exceed the peer's credit of {credit.total}")
        await credit.take(size)
        try:
            body = read()
            digest = digest_of(body)
            assert len(body) == size, f"{size} bytes promised, {len(body)} read"
        except BaseException:
            credit.give(size)
            raise
        answer = await self._ask(chunk, body, digest, size)
        for _ in range(RESENDS):
            if not isinstance(answer.fields, Nack):
                break
            self.resent += 1
            await credit.take(size)
            answer = await self._ask(chunk, body, digest, size)
        self._expect(answer, Ack)
        return digest

    async def renew(self, renew: Renew) -> None:
        self._opened()
        self._expect(await self._ask(renew), Ack)

    async def seal(self, manifest: Manifest) -> None:
        self._opened()
        self._expect(await self._ask(manifest), Sealed)

    def close(self) -> None:
        if not self.lost and self._credit is not None:
            with contextlib.suppress(WorkerLost):
                self._wire.send(encode(0, Bye()))
        self._lose("closed on this side")
        if self._opening is not None:
            self._opening.cancel()

    async def _greet(self) -> None:
        """Ends with credit or with the link lost; never raises, for nobody may be waiting."""
        try:
            async with asyncio.timeout(self._open_timeout):
                await self._wire.open(self._received, self._lose)
                answer = await self._ask(Greeting(self.peer.incarnation), encode_hello(self._hello))
        except TimeoutError:
            self._lose(f"no handshake within {self._open_timeout} s")
            return
        except WorkerLost as error:
            self._lose(error.message)
            return
        match answer.fields:
            case Welcome(credit):
                try:
                    found = decode_hello(bytes(answer.body)).peer
                except ValueError as error:
                    self._lose(f"unreadable welcome: {error}")
                    return
                if found == self.peer:
                    self._credit = Credit(credit)
                    return
                reason = f"{found} answered for {self.peer}"
            case Refuse():
                reason = _text(answer)
            case fields:
                reason = f"{type(fields).__name__} in answer to a handshake"
        self._lose(reason, HandshakeRefused)

    def _opened(self) -> Credit:
        self._check()
        assert self._credit is not None, "link used before it was opened"
        return self._credit

    def _check(self) -> None:
        if self._ended is not None:
            error, reason = self._ended
            raise error(f"{self.peer.name}: {reason}")

    async def _ask(
        self, fields: Fields, body: Buffer = b"", digest: int | None = None, size: int = 0
    ) -> Frame:
        """Send a frame and wait for its answer, on which `size` bytes of credit come back.

        Both the credit and the deadline stand if the caller is cancelled: the peer still counts the
        bytes, and a peer that does not answer is lost whoever asked.
        """
        self._check()
        loop = asyncio.get_running_loop()
        serial, answered = next(self._serials), loop.create_future()
        self._asked[serial] = _Question(
            answered,
            size,
            loop.call_later(
                self._answer_timeout, self._lose, f"no answer within {self._answer_timeout} s"
            ),
        )
        try:
            self._wire.send(encode(serial, fields, body, digest))
        except WorkerLost as error:
            answered.cancel()
            self._lose(error.message)
            raise
        frame: Frame = await answered
        return frame

    def _received(self, parts: list[Buffer]) -> None:
        try:
            frame = decode(parts)
        except (BadFrame, HandshakeRefused) as error:
            # It may have been the answer to anything; a sound peer never sends one.
            self._lose(f"unreadable answer: {error}")
            return
        if isinstance(frame.fields, Bye):
            self._lose(_text(frame) or "said goodbye")
            return
        question = self._asked.pop(frame.serial, None)
        if question is None:
            return
        question.deadline.cancel()
        if self._credit is not None:
            self._credit.give(question.size)
        if not question.answered.done():
            question.answered.set_result(frame)

    def _expect(self, answer: Frame, kind: type[Fields]) -> None:
        if isinstance(answer.fields, kind):
            return
        match answer.fields:
            case Reject():
                reason = _text(answer)
            case Nack():
                reason = f"KV arrived damaged {1 + RESENDS} times"
            case _:
                reason = "chunks are missing"
        raise TransferFailed(f"{self.peer.name}: {reason}")

    def _lose(self, reason: str, error: type[BatonError] = WorkerLost) -> None:
        if self.lost:
            return
        self._ended = error, reason
        self._wire.close()
        for question in self._asked.values():
            question.deadline.cancel()
            if not question.answered.done():
                question.answered.set_exception(WorkerLost(f"{self.peer.name}: {reason}"))
        self._asked.clear()
        if self._credit is not None:
            self._credit.fail(WorkerLost(f"{self.peer.name}: {reason}"))


def _text(frame: Frame) -> str:
    return bytes(frame.body).decode(errors="replace")
