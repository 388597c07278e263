"""Receiver: the event loop's half of taking KV in.

It knows frames, peers and credit, not landings: what is intact and from a peer in good standing is
posted to the step thread, whose answer goes back to the sender. Any transport can drive it: `take`
gets what arrived on a route, `send` puts something on one.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cluster import metrics
from cluster.errors import HandshakeRefused, StartError
from cluster.messages import Hello, KVLayout, Peer
from cluster.wire.codec import decode_hello, encode_hello
from kvtransfer.frames import (
    BadFrame,
    Buffer,
    Bye,
    Chunk,
    DamagedBody,
    Digest,
    Fields,
    Frame,
    Greeting,
    Manifest,
    Nack,
    Refuse,
    Renew,
    Welcome,
    decode,
    digest_of,
    encode,
    row_bytes,
)

log = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")

CREDIT_BYTES = 64 << 20
MAX_STRIKES = 10
"""So many bad frames in a row and a route is cut: nothing more from it is even parsed."""
MAX_UNANSWERED = 1 << 16
"""Frames under way on one link. Credit bounds their bytes, this what an empty one costs."""
OVERDRAFT = 2
"""How many times its credit a sender may have under way before it is cut. A sound one never has
more than once, but a frame that comes again comes on top of a full window."""
MAX_HELLO_BYTES = 16 << 10
"""Far more than any Hello needs. What it says is remembered, and is in the answer and the log."""
MAX_KNOWN = 1024
"""Links and cut routes that are remembered; the least recent is forgotten."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """One intact frame for the step thread, which calls `reply` exactly once, from its own thread.

    `body` is the network's memory and only valid until then.
    """

    fields: Chunk | Renew | Manifest
    body: Buffer
    digest: int
    reply: Callable[[Fields, str], None]


@dataclass(slots=True)
class _Inbound:
    """One sender's link as this side sees it."""

    peer: Peer
    unanswered: int = 0  # frames
    unanswered_bytes: int = 0


class Receiver:
    """Belongs to the event loop. `later(function, *args)` is how another thread calls into it.

    Another `digest` than the wire's own is for measuring what it costs.
    Raises StartError for a credit within which not even the smallest chunk could come.
    """

    def __init__(
        self,
        hello: Hello,
        post: Callable[[Arrived], None],
        later: Callable[..., object],
        credit: int = CREDIT_BYTES,
        digest: Digest = digest_of,
    ) -> None:
        least = row_bytes(hello.layout)
        if credit < least:
            raise StartError(
                f"--credit-bytes {credit} is too small: one token of one layer takes {least}"
            )
        self.hello = hello
        self.counters: Counter[str] = Counter()
        self.send: Callable[[bytes, tuple[Buffer, Buffer]], None] = lambda route, parts: None
        self._post = post
        self._later = later
        self._credit = credit
        self._digest = digest
        self._links: OrderedDict[bytes, _Inbound] = OrderedDict()
        self._strikes: OrderedDict[bytes, int] = OrderedDict()

    def metrics(self) -> Iterator[tuple[str, float]]:
        """For `Load.counters`."""
        counters = self.counters
        for reason, frames in (
            ("malformed", counters["bad_frames"] - counters["damaged"]),
            ("damaged", counters["damaged"]),
            ("fenced", counters["fenced"]),
            ("cut", counters["dropped"]),
        ):
            yield metrics.labelled(metrics.BAD_FRAMES, reason=reason), frames
        for reason in ("refused", "evicted", "overdrawn", "keyless", "other_user"):
            yield metrics.labelled(metrics.LINKS_ENDED, reason=reason), counters[reason]

    def take(self, route: bytes, parts: list[Buffer]) -> None:
        """One message from the network. Never raises, whatever it is."""
        if self._strikes.get(route, 0) >= MAX_STRIKES:
            self.counters["dropped"] += 1
            return
        try:
            frame = decode(parts, self._digest)
        except DamagedBody as error:
            self.counters["damaged"] += 1
            if route in self._links:
                self.send(route, encode(error.serial, Nack()))
            self._strike(route)
        except HandshakeRefused as error:
            self.counters["refused"] += 1
            self.send(route, encode(0, Bye(), error.message.encode()))
            self._strike(route)
        except BadFrame:
            self._strike(route)
        else:
            self._sort(route, frame)

    def _sort(self, route: bytes, frame: Frame) -> None:
        match frame.fields:
            case Greeting():
                self._greet(route, frame)
            case Bye():
                self._links.pop(route, None)
            case Chunk() | Renew() | Manifest():
                self._admit(route, frame)
            case _:
                self._strike(route)

    def _greet(self, route: bytes, frame: Frame) -> None:
        assert isinstance(frame.fields, Greeting)
        try:
            if len(frame.body) > MAX_HELLO_BYTES:
                raise ValueError("no hello is that long")
            theirs = decode_hello(bytes(frame.body))
        except ValueError:
            self._strike(route)
            return
        reason = mismatch(self.hello, theirs, frame.fields.incarnation)
        if reason is not None:
            self.counters["refused"] += 1
            log.warning("link refused: %s", reason, extra={"peer": theirs.peer.name})
            self.send(route, encode(frame.serial, Refuse(), reason.encode()))
            return
        link = self._links.get(route)
        if link is None or link.peer != theirs.peer:  # else it was said twice
            self._evict(theirs.peer)
            self._strikes.pop(route, None)
            _remember(self._links, route, _Inbound(theirs.peer))
        self.send(route, encode(frame.serial, Welcome(self._credit), encode_hello(self.hello)))

    def _evict(self, peer: Peer) -> None:
        """End every other link of this name: the last greeting has the link.

        Whether the newer of two starts is still there only gateways know, so nobody is refused. An
        old one that comes back gets no new handoffs, and landings reject what it has left.
        """
        for route, link in list(self._links.items()):
            if link.peer.name == peer.name:
                self.counters["evicted"] += 1
                self._cut(route, f"replaced by incarnation {peer.incarnation}")

    def _admit(self, route: bytes, frame: Frame) -> None:
        assert isinstance(frame.fields, Chunk | Renew | Manifest)
        link = self._links.get(route)
        if link is None:
            self.counters["fenced"] += 1
            self.send(route, encode(0, Bye(), b"no handshake, or it was replaced since"))
            return
        size = len(frame.body)
        most = OVERDRAFT * self._credit
        if link.unanswered_bytes + size > most or link.unanswered >= MAX_UNANSWERED:
            self.counters["overdrawn"] += 1
            _remember(self._strikes, route, MAX_STRIKES)
            self._cut(route, f"credit of {self._credit} bytes overdrawn")
            return
        self._strikes.pop(route, None)
        self._links.move_to_end(route)
        self.counters["frames"] += 1
        self.counters["bytes"] += size
        link.unanswered += 1
        link.unanswered_bytes += size
        serial = frame.serial

        def reply(fields: Fields, text: str = "") -> None:
            self._later(self._answer, route, link, serial, size, fields, text)

        self._post(Arrived(frame.fields, frame.body, frame.digest, reply))

    def _answer(
        self, route: bytes, link: _Inbound, serial: int, size: int, fields: Fields, text: str
    ) -> None:
        link.unanswered -= 1
        link.unanswered_bytes -= size
        if self._links.get(route) is link:
            self.send(route, encode(serial, fields, text.encode()))

    def _strike(self, route: bytes) -> None:
        self.counters["bad_frames"] += 1
        strikes = self._strikes.get(route, 0) + 1
        _remember(self._strikes, route, strikes)
        if strikes >= MAX_STRIKES:
            self._cut(route, f"{strikes} bad frames in a row")

    def _cut(self, route: bytes, reason: str) -> None:
        link = self._links.pop(route, None)
        if link is not None:
            log.warning("link cut: %s", reason, extra={"peer": link.peer.name})
        self.send(route, encode(0, Bye(), reason.encode()))


def mismatch(ours: Hello, theirs: Hello, meant: int) -> str | None:
    """Why these two may not exchange KV, with both values, or None. `meant` is the incarnation of
    ours that they want to talk to."""
    for what, wanted, found in (
        ("protocol version", ours.protocol, theirs.protocol),
        ("incarnation", ours.peer.incarnation, meant),
        ("model configuration", ours.fingerprint.config, theirs.fingerprint.config),
        ("model weights", ours.fingerprint.weights, theirs.fingerprint.weights),
        ("KV layout", _describe(ours.layout), _describe(theirs.layout)),
    ):
        if wanted != found:
            return f"{what} {found} meets {wanted}"
    return None


def _describe(layout: KVLayout) -> str:
    groups = "+".join(
        f"{group.layers}x{group.kv_heads}x{group.head_dim}/{group.window}"
        for group in layout.groups
    )
    return f"{groups}:{layout.dtype}"


def _remember(known: OrderedDict[K, V], key: K, value: V) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > MAX_KNOWN:
        known.popitem(last=False)
