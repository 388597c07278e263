"""Calls with an Idempotency-Key: whoever lost the connection finds the answer where it has come to.

    call -> Kept.attach -> Run <- work        one task makes the answer, whoever listens
                            |`--> read        replays it from the beginning and goes on live

The same key, tenant and body is the same call: it is computed once. Only whole answers are kept. A
call that failed is forgotten, and its key begins another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import BadRequest, Cancelled, IdempotencyMismatch, Superseded

MOST_RUNS = 1024
MOST_BYTES = 64 << 20

AHEAD = 64
"""Pieces that an answer which may not be kept is ahead of its reader."""

Make = Callable[["Sink"], Awaitable[None]]
Lost = Callable[[Exception], object]

_KEY = re.compile(rb"[\x21-\x7e]{1,255}")


@dataclass(frozen=True, slots=True)
class Claim:
    """Whose call it is, by which key, and what it asks for."""

    tenant: bytes
    key: bytes
    digest: bytes


def key_of(values: Sequence[bytes]) -> bytes | None:
    """The key among a call's headers of that name. Raises BadRequest."""
    if not values:
        return None
    if len(values) > 1 or not _KEY.fullmatch(values[0]):
        raise BadRequest(
            "The Idempotency-Key must be one word of 1 to 255 visible ASCII characters.",
            code="invalid_idempotency_key",
        )
    return values[0]


def digest_of(*parts: bytes) -> bytes:
    """Of what a call asks for; a long one takes milliseconds."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=32).digest()


class Sink(Protocol):
    """Where an answer goes: to its client, or to where it is kept for one."""

    fallback: bool
    """Whether the head says that a decode worker read the prompt (R10)."""

    async def write(self, data: bytes) -> None:
        """The next part, complete in itself. Waits while those before it have nowhere to go."""


class Client(Sink, Protocol):
    """Who has called."""

    reattached: bool
    """Whether the head says that the call was running or complete already."""


class Run:
    """One answer on its way, in pieces. Its newest reader is the only one."""

    def __init__(self, kept: Kept, claim: Claim) -> None:
        self.claim = claim
        self.fallback = False  # of the answer's head: a decode worker read the prompt (R10)
        self.ended = False
        self.size = 0
        self.task: asyncio.Task[None] | None = None
        self._kept = kept
        self._keeping = True
        self._pieces: list[bytes] = []
        self._dropped = 0  # pieces of the beginning that are not there any more
        self._error: Exception | None = None
        self._readers = 0  # so far
        self._reading = False
        self._news = asyncio.Event()
        self._leaves: asyncio.TimerHandle | None = None

    async def write(self, piece: bytes) -> None:
        """The next piece. Waits only where it cannot be kept and nobody has read it."""
        self._pieces.append(piece)
        self._tell()
        if self._keeping:
            self.size += len(piece)
            self._kept.grew(self, len(piece))
        while not self._keeping and len(self._pieces) > AHEAD:
            await self._news.wait()

    async def read(self) -> AsyncGenerator[bytes, None]:
        """All pieces from the first one. Raises Superseded, and what befell the work."""
        self._readers += 1
        me, at = self._readers, 0
        self._reading = True
        self.stay()
        self._tell()  # to the reader before us
        try:
            while True:
                if me != self._readers:
                    raise Superseded("Another connection has taken this answer over.")
                if at < self._dropped + len(self._pieces):
                    at += 1
                    yield self._pieces[at - 1 - self._dropped]
                    if not self._keeping:
                        self._drop(at)
                elif not self.ended:
                    await self._news.wait()
                elif self._error is not None:
                    raise self._error
                else:
                    return
        finally:
            if me == self._readers:
                self._reading = False
                self.wait_for_reader()

    async def work(self, make: Make, lost: Lost) -> None:
        """Have the answer made. A failure is for its reader; without one, for `lost`."""
        try:
            await make(self)
        except asyncio.CancelledError:
            self._error = Cancelled("Nobody came back for this answer.")
        except Exception as error:
            self._error = error
        self.ended = True
        self._tell()
        if self._error is not None:
            self._kept.forget(self)
            if not self._reading:
                lost(self._error)
        elif not self._reading:
            self.wait_for_reader()

    @property
    def idle(self) -> bool:
        """Complete, and nobody is reading it."""
        return self.ended and not self._reading

    def wait_for_reader(self) -> None:
        """From now on somebody has some time to come."""
        self.stay()
        if self._keeping:
            loop = asyncio.get_running_loop()
            self._leaves = loop.call_later(self._kept.keep_s, self.leave)
        else:
            self.leave()

    def stay(self) -> None:
        if self._leaves is not None:
            self._leaves.cancel()
            self._leaves = None

    def leave(self) -> None:
        """Nobody needs it any more."""
        self._keeping = False
        self.stay()
        self._kept.forget(self)
        if not self.ended and self.task is not None:
            self.task.cancel()

    def let_go(self) -> None:
        """It may go on for the reader it has, but nobody can come back for it."""
        self._keeping = False
        self._tell()
        if not self._reading:
            self.leave()

    def _drop(self, until: int) -> None:
        del self._pieces[: until - self._dropped]
        self._dropped = until
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Kept:
    """The runs of one gateway, by tenant and key. Owned by the event loop.

    What it keeps is bounded: the oldest that is complete goes first. If none is, a new call is not
    kept, and one that grows is kept no longer; both are answered all the same.
    """

    def __init__(
        self, keep_s: float = 30.0, most_runs: int = MOST_RUNS, most_bytes: int = MOST_BYTES
    ) -> None:
        self.keep_s = keep_s
        self._most_runs = most_runs
        self._most_bytes = most_bytes
        self._runs: dict[tuple[bytes, bytes], Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes = 0

    @property
    def running(self) -> int:
        """Answers that are being made."""
        return len(self._tasks)

    def __contains__(self, claim: Claim) -> bool:
        return (claim.tenant, claim.key) in self._runs

    async def deliver(self, claim: Claim | None, make: Make, client: Client, lost: Lost) -> None:
        """Have a call answered: for this client alone or, with a claim, for whoever comes back.

        Arguments as for `attach`. Raises what befell the call, IdempotencyMismatch, Superseded.
        """
        run = None
        if claim is not None:
            client.reattached = claim in self
            run = self.attach(claim, make, lost)
        if run is None:
            await make(client)
            return
        async with aclosing(run.read()) as pieces:
            async for piece in pieces:
                client.fallback = run.fallback
                await client.write(piece)

    def attach(self, claim: Claim, make: Make, lost: Lost) -> Run | None:
        """The run of this call, to be read at once; `make` writes it if there is none yet.

        `lost` is told what befell it when nobody reads it. None: there is no room to keep it.
        Raises IdempotencyMismatch.
        """
        run = self._runs.get((claim.tenant, claim.key))
        if run is not None:
            if run.claim.digest != claim.digest:
                raise IdempotencyMismatch("This Idempotency-Key was used for another request.")
            return run
        if len(self._runs) >= self._most_runs and not self._forget_oldest():
            return None
        run = self._runs[claim.tenant, claim.key] = Run(self, claim)
        run.task = asyncio.create_task(run.work(make, lost))
        self._tasks.add(run.task)
        run.task.add_done_callback(self._tasks.discard)
        run.wait_for_reader()
        return run

    def grew(self, run: Run, count: int) -> None:
        self._bytes += count
        while self._bytes > self._most_bytes and self._forget_oldest():
            pass
        if self._bytes > self._most_bytes:
            self.forget(run)
            run.let_go()

    def forget(self, run: Run) -> None:
        """Nobody can attach to it from now on. Idempotent."""
        owner = run.claim.tenant, run.claim.key
        if self._runs.get(owner) is run:
            del self._runs[owner]
            self._bytes -= run.size

    async def close(self) -> None:
        """End whatever runs."""
        for run in list(self._runs.values()):
            run.leave()
        await asyncio.gather(*self._tasks)

    def _forget_oldest(self) -> bool:
        oldest = next((run for run in self._runs.values() if run.idle), None)
        if oldest is None:
            return False
        oldest.leave()
        return True
