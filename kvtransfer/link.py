"""Link: what carries the bytes to one worker. Any transport that passes the contract tests will do.

`FramedLink` is all of a link but the transport: handshake, serials, credit, resending, deadlines.
A transport that moves parts in order needs only the few lines of a `Wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np

from cluster.errors import BatonError, HandshakeRefused, TransferFailed, WorkerLost
from cluster.messages import Hello, Peer
from cluster.wire.codec import decode_hello, encode_hello
from engine.staging import Room
from kvtransfer.frames import (
    Ack,
    BadFrame,
    Buffer,
    Bye,
    Chunk,
    Digest,
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
CALM_BYTES = 8 << 20
"""Measured: 2 MiB chunks through shared memory run at 6.7 GB/s with 8 MiB under way, at 5.0 with
64 MiB; below 4 chunks sender and receiver begin to wait for each other."""
PATIENCE_S = 0.002
KEPT = 8
"""Rooms."""
RESENDS = 2
"""How often a body that arrived damaged is sent again."""


Fill = Callable[[Room], Awaitable[None] | None]
Sent = Callable[[int], None]


def ignore(digest: int) -> None:
    """For who need not know that a chunk is under way."""


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

    async def send(self, chunk: Chunk, size: int, fill: Fill, sent: Sent = ignore) -> int:
        """Returns once the peer has written the chunk: the digest of its body.

        Waits for credit, then calls `fill` with memory for the body, `size` bytes, and awaits what
        that returns, in the caller's task, so never after the caller was cancelled. Calls `sent`
        with the digest once the chunk is under way: what is asked later arrives behind it, unless
        it arrives damaged. Raises TransferFailed when the peer rejects it or it keeps arriving
        damaged.
        """

    async def renew(self, renew: Renew) -> None:
        """Keep the landing's lease alive. Raises TransferFailed if the landing is gone."""

    async def seal(self, manifest: Manifest) -> bool:
        """Whether the landing is sealed: not while a chunk of it is still to come (again).

        Raises TransferFailed.
        """

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


class Rooms(Protocol):
    """Where the bodies of a link's chunks lie until they are answered."""

    async def room(self, size: int) -> Room:
        """Writable memory of `size` bytes. May wait until some is free. Raises WorkerLost."""

    def free(self, room: Room) -> None:
        """The peer needs it no longer."""


class Heap:
    """Rooms of this process's own memory, for a transport that copies out of it.

    The last few are used again: new memory comes page by page, which takes longer than to fill it.
    """

    def __init__(self) -> None:
        self._freed: deque[memoryview] = deque(maxlen=KEPT)

    async def room(self, size: int) -> memoryview:
        for index, room in enumerate(self._freed):
            if len(room) == size:
                del self._freed[index]
                return room
        return np.empty(size, dtype=np.uint8).data

    def free(self, room: Room) -> None:
        assert isinstance(room, memoryview)
        self._freed.append(room)


class Credit:
    """Bytes that may be under way, handed out first come, first served.

    More than `calm` of them are under way only while the peer answers nothing, as in the middle of
    a step of its. Otherwise more than that, or than two chunks, would get nothing there sooner, and
    push out of the processors' caches what is just being copied: that halves the speed.
    """

    def __init__(self, total: int, calm: int = CALM_BYTES) -> None:
        self.total = total
        self.free = total
        self._calm = calm
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._given = 0.0  # when bytes last came back
        self._timer: asyncio.TimerHandle | None = None

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
        self._given = asyncio.get_running_loop().time()
        self._serve()

    def fail(self, error: Exception) -> None:
        """Nobody waiting will be served any more."""
        for _, turn in self._waiting:
            if not turn.done():
                turn.set_exception(error)
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _serve(self, calmly: bool = True) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done():
                under_way = self.total - self.free
                if size > self.free:
                    return
                if calmly and under_way + size > max(self._calm, 2 * size):
                    self._wait()
                    return
                self.free -= size
                turn.set_result(None)
            self._waiting.popleft()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._look)

    def _look(self) -> None:
        self._timer = None
        silent = asyncio.get_running_loop().time() - self._given >= PATIENCE_S
        self._serve(calmly=not silent)


@dataclass(eq=False, slots=True)
class _Question:
    answered: asyncio.Future[Frame]
    size: int  # bytes of credit that come back with the answer
    due: float  # when the link is lost without it, unless it has moved since
    room: Room | None = None  # to be freed with the answer: who asked has gone
    heard: bool = False  # the answer has come, perhaps just after who asked was cancelled


class FramedLink:
    """A Link over any Wire. Belongs to the event loop.

    A question that is not answered within `answer_timeout` seconds of being asked, or of the answer
    to the one before it, loses the link, and with it every handoff that uses it: a line may be
    slow, but has to move. Another `digest` than the wire's own is for measuring what it costs.
    """

    def __init__(
        self,
        wire: Wire,
        hello: Hello,
        peer: Peer,
        *,
        rooms: Rooms | None = None,
        open_timeout: float = 2.0,
        answer_timeout: float = ANSWER_TIMEOUT_S,
        digest: Digest = digest_of,
    ) -> None:
        self.peer = peer
        self.resent = 0
        self._wire = wire
        self._rooms = rooms or Heap()
        self._digest = digest
        self._hello = hello
        self._open_timeout = open_timeout
        self._answer_timeout = answer_timeout
        self._opening: asyncio.Task[None] | None = None
        self._credit: Credit | None = None  # known once welcomed
        self._serials = count(1)
        self._asked: dict[int, _Question] = {}  # in the order of asking, so of their answers
        self._moved = 0.0  # when the oldest question was last answered
        self._deadline: asyncio.TimerHandle | None = None  # of the oldest or an older question
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

    async def send(self, chunk: Chunk, size: int, fill: Fill, sent: Sent = ignore) -> int:
        credit = self._opened()
        if size > credit.total:
            raise TransferFailed(f"{size} bytes exceed the peer's credit of {credit.total}")
        await credit.take(size)
        try:
            room = await self._rooms.room(size)
        except BaseException:
            credit.give(size)
            raise
        try:
            if (filling := fill(room)) is not None:
                await filling
            digest = self._digest(room)
        except BaseException:
            self._rooms.free(room)
            credit.give(size)
            raise
        question = self._ask(chunk, room, digest, size)
        try:
            sent(digest)
            answer = await question.answered
            for _ in range(RESENDS):
                if not isinstance(answer.fields, Nack):
                    break
                self.resent += 1
                await credit.take(size)
                question = self._ask(chunk, room, digest, size)
                answer = await question.answered
        finally:
            if question.answered.cancelled() and not question.heard:
                question.room = room
            else:
                self._rooms.free(room)
        self._expect(answer, Ack)
        return digest

    async def renew(self, renew: Renew) -> None:
        self._opened()
        self._expect(await self._ask(renew).answered, Ack)

    async def seal(self, manifest: Manifest) -> bool:
        self._opened()
        answer = await self._ask(manifest).answered
        if isinstance(answer.fields, Ack):
            return False
        self._expect(answer, Sealed)
        return True

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
                hello = encode_hello(self._hello)
                answer = await self._ask(Greeting(self.peer.incarnation), hello).answered
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

    def _ask(
        self, fields: Fields, body: Buffer = b"", digest: int | None = None, size: int = 0
    ) -> _Question:
        """Send a frame. On its answer `size` bytes of credit come back.

        Both the credit and the deadline stand if the asker is cancelled: the peer still counts the
        bytes, and a peer that does not answer is lost whoever asked.
        """
        self._check()
        loop = asyncio.get_running_loop()
        serial, due = next(self._serials), loop.time() + self._answer_timeout
        question = _Question(loop.create_future(), size, due)
        try:
            self._wire.send(encode(serial, fields, body, digest))
        except WorkerLost as error:
            self._lose(error.message)
            raise
        self._asked[serial] = question
        if self._deadline is None:
            self._deadline = loop.call_at(due, self._look)
        return question

    def _look(self) -> None:
        """One timer for all questions, as they are due in the order in which they were asked."""
        self._deadline = None
        loop = asyncio.get_running_loop()
        due = next((question.due for question in self._asked.values()), None)
        if due is None:
            return
        due = max(due, self._moved + self._answer_timeout)
        if due <= loop.time():
            self._lose(f"no answer within {self._answer_timeout} s")
        else:
            self._deadline = loop.call_at(due, self._look)

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
        if frame.serial == next(iter(self._asked), None):
            self._moved = asyncio.get_running_loop().time()
        question = self._asked.pop(frame.serial, None)
        if question is None:
            return
        question.heard = True
        if question.room is not None:
            self._rooms.free(question.room)
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
            case fields:
                reason = f"{type(fields).__name__} is no answer to that"
        raise TransferFailed(f"{self.peer.name}: {reason}")

    def _lose(self, reason: str, error: type[BatonError] = WorkerLost) -> None:
        if self.lost:
            return
        self._ended = error, reason
        self._wire.close()
        if self._deadline is not None:
            self._deadline.cancel()
        for question in self._asked.values():
            if not question.answered.done():
                question.answered.set_exception(WorkerLost(f"{self.peer.name}: {reason}"))
        self._asked.clear()
        if self._credit is not None:
            self._credit.fail(WorkerLost(f"{self.peer.name}: {reason}"))


def _text(frame: Frame) -> str:
    return bytes(frame.body).decode(errors="replace")
