"""The adversary: sees every frame, sends what it likes, over any road to the decode worker.

Its frames are damaged, cut, swapped, repeated, late, for landings that are gone or came back,
forged with digests that fit, or noise.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import zmq

from cluster.messages import Peer
from cluster.wire.codec import encode_hello
from kvtransfer.frames import (
    _DIGEST,
    _PREFIX,
    MAGIC,
    VERSION,
    Ack,
    Address,
    Box,
    Chunk,
    Fields,
    Frame,
    Greeting,
    Manifest,
    Nack,
    Renew,
    Welcome,
    digest_of,
    encode,
)
from kvtransfer.landing import Site
from kvtransfer.near import _PLACE, _message
from kvtransfer.shared_memory import KIND
from kvtransfer.unix import name_of, new_socket
from tests.chaos.house import KEPT_FRAMES, House, Key, frame_of
from tests.kvtransfer.fakes import (
    DECODE_PEER,
    LAYOUT,
    prefill_hello,
)
from tests.kvtransfer.test_shared_memory import SEALS

STRIKES = 10  # "a peer with ten bad frames is cut"


class Road(Protocol):
    """How the adversary's frames travel. One road is one connection."""

    async def deliver(self, parts: list[bytes]) -> None:
        """Returns when the receiver has looked at it."""

    def close(self) -> None: ...


class StraightRoad:
    def __init__(self, house: House, route: bytes) -> None:
        self._house, self._route = house, route

    async def deliver(self, parts: list[bytes]) -> None:
        self._house.receiver.take(self._route, list(parts))

    def close(self) -> None:
        pass


class ZmqRoad:
    """A DEALER that follows no rules."""

    def __init__(self, house: House, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._house = house
        self._socket = context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(address)

    async def deliver(self, parts: list[bytes]) -> None:
        before = self._house.attacks
        self._socket.send_multipart(parts or [b""])
        await self._house.more_than(before)

    def close(self) -> None:
        self._socket.close()


class SharedRoad:
    """A neighbour whose memory changes when it likes."""

    SIZE = 1 << 16

    def __init__(self, house: House) -> None:
        self._house = house
        self._new = True  # the first frame, which may be a hello, travels whole
        self._descriptor = os.memfd_create("adversary", os.MFD_ALLOW_SEALING)
        os.ftruncate(self._descriptor, self.SIZE)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SEALS)
        self._memory = mmap.mmap(self._descriptor, self.SIZE)
        self._socket = new_socket()
        self._socket.connect(name_of(KIND, DECODE_PEER))
        socket.send_fds(self._socket, [b"ring"], [self._descriptor])

    async def deliver(self, parts: list[bytes]) -> None:
        before = self._house.attacks
        self._socket.send(self._message(parts))
        await self._house.more_than(before)

    def _message(self, parts: list[bytes]) -> bytes:
        if len(parts) != 2:
            return b"".join(parts)[: 1 << 14] or b"\0"
        random = self._house.random
        if self._new or random.random() < 0.3:
            self._new = False
            return _message((parts[0], parts[1]))
        start = random.randrange(self.SIZE - len(parts[1]))
        self._memory[start : start + len(parts[1])] = parts[1]
        if random.random() < 0.1:  # a place outside, on the border, or beyond all numbers
            start = random.choice([self.SIZE, self.SIZE - 1, 2**63, 2**64 - 2])
        return _PLACE.pack(len(parts[0]), start, len(parts[1])) + parts[0]

    def close(self) -> None:
        self._socket.close()
        self._memory.close()
        os.close(self._descriptor)


class Adversary:
    """Sends what it likes along roads that it opens anew whenever it is cut off."""

    def __init__(self, house: House, road: Callable[[], Road]) -> None:
        self._house = house
        self._random = house.random
        self._new_road = road
        self._starts = 0
        self._road: Road | None = None
        self._strikes = 0
        self._stranger = False
        self._rage = 0  # so many frames of mere noise follow

    async def attack(self) -> None:
        """One frame, and what the receiver counts of it."""
        if self._road is None or self._strikes >= STRIKES + 3:
            await self._intrude()
        assert self._road is not None
        counters, landings = self._house.receiver.counters, self._house.decode.landings
        parts, harmless = self._make()
        before = counters.copy()
        taken = sum(landings.rejected.values())
        await self._road.deliver(parts)
        if self._strikes >= STRIKES:
            assert counters["dropped"] == before["dropped"] + 1, "a peer that was cut is heard"
            self._strikes += 1
        elif counters["bad_frames"] > before["bad_frames"]:
            self._strikes += 1
        elif self._stranger:
            assert harmless and counters["fenced"] == before["fenced"] + 1, parts
        else:
            assert harmless and counters["frames"] > before["frames"], (parts, counters - before)
            self._strikes = 0
            rejected = sum(landings.rejected.values()) - taken
            assert rejected or tuple(parts) in self._house.sent, parts

    async def _intrude(self) -> None:
        """A new connection; one in four says no hello, so all it sends is a stranger's: the second,
        for a short attack too."""
        self.close()
        self._road, self._strikes = self._new_road(), 0
        self._starts += 1
        self._stranger = self._starts % 4 == 2
        if not self._stranger:
            hello = prefill_hello(peer=Peer(f"evil{self._starts}", 1))
            greeting = Greeting(DECODE_PEER.incarnation)
            self._house.intrusions += 1
            await self._road.deliver(list(map(bytes, encode(1, greeting, encode_hello(hello)))))

    def close(self) -> None:
        if self._road is not None:
            self._road.close()
            self._road = None

    def _make(self) -> tuple[list[bytes], bool]:
        """A frame, and whether its bytes are those of some frame: intact, though out of place."""
        random = self._random
        if random.random() < 0.01:
            self._rage = STRIKES + 5
        self._rage -= 1
        if self._rage > 0 or not self._house.kept or random.random() < 0.1:
            return self._noise(), False
        kept = self._house.kept
        near = min(len(kept), random.choice([16, KEPT_FRAMES]))  # of landings that are, or were
        key = kept[-1 - random.randrange(near)]
        if random.random() < 0.45:
            return self._damaged(key), False
        if random.random() < 0.4:
            return list(key), True
        forged = self._forged(frame_of(key))
        return (self._noise(), False) if forged is None else (forged, True)

    def _noise(self) -> list[bytes]:
        random = self._random
        match random.randrange(5):
            case 0:
                return [random.randbytes(random.randrange(90)) for _ in range(random.randrange(5))]
            case 1:  # a length beyond all memory, under digests that fit
                length = random.choice([2**63, 2**64 - 1, (16 << 20) + 1])
                kind = random.choice([1, 2, 4, 11, 99])
                prefix = _PREFIX.pack(MAGIC, VERSION, kind, 1, length, random.getrandbits(64))
                fields = random.randbytes(random.choice([0, 8, Chunk.WIRE.size]))
                return [prefix + _DIGEST.pack(digest_of(prefix + fields)) + fields, b""]
            case 2:  # answers are no questions
                fields = random.choice([Ack(), Nack(), Welcome(2**40)])
                return list(map(bytes, encode(random.getrandbits(64), fields)))
            case 3:
                return [b"", b""]
            case _:  # a hello that is none
                return list(map(bytes, encode(1, Greeting(0), b"\xff" + random.randbytes(20))))

    def _damaged(self, key: Key) -> list[bytes]:
        random = self._random
        parts = [bytearray(part) for part in key]
        which = random.choice([part for part in parts if part])
        match random.randrange(6):
            case 0 | 1 | 2:
                for _ in range(random.choice([1, 1, 1, 2, 9])):
                    bit = random.randrange(8 * len(which))
                    which[bit // 8] ^= 1 << bit % 8
            case 3:
                del which[random.randrange(len(which)) :]
            case 4:
                which += random.randbytes(random.randrange(1, 9))
            case _:
                other = bytearray(random.choice(self._house.kept)[1])
                parts = random.choice([parts[::-1], [*parts, b""], parts[:1], [parts[0], other]])
        if tuple(map(bytes, parts)) in self._house.sent:  # two flips of one bit, an equal body
            return [b"unlucky"]
        return list(map(bytes, parts))

    def _forged(self, frame: Frame) -> list[bytes] | None:
        """Digests that fit, and something out of place; None where nothing could be."""
        fields, body = frame.fields, bytes(frame.body)
        assert isinstance(fields, Chunk | Renew | Manifest)
        site = self._house.decode.landings._by_id.get(fields.address.landing)
        current = site is not None and site.address == fields.address
        if not current or self._random.random() < 0.4:
            fields = replace(fields, address=self._elsewhere(fields))
        elif isinstance(fields, Chunk):
            assert site is not None
            fields, body = self._misplaced(fields, body, site)
        elif isinstance(fields, Manifest) and site is not None and site.cells.full:
            fields = self._random.choice(
                [replace(fields, chunks=fields.chunks + 1), replace(fields, digest=bytes(16))]
            )
        elif isinstance(fields, Manifest):
            fields = replace(fields, tokens=range(fields.tokens.start, fields.tokens.stop + 1))
        else:
            return None
        return list(map(bytes, encode(self._random.getrandbits(64), fields, body)))

    def _elsewhere(self, fields: Chunk | Renew | Manifest) -> Address:
        """An address that is nobody's: foreign, past or to come in one of its parts."""
        address, random = fields.address, self._random
        changes = [
            {"landing": random.randbytes(16).hex()},
            {"generation": address.generation + random.choice([7, 2**40])},
            {"incarnation": address.incarnation + random.choice([-1, 1])},
            {"attempt": address.attempt + random.choice([7, 2**20])},
        ]
        return address._replace(**random.choice(changes))

    def _misplaced(self, chunk: Chunk, body: bytes, site: Site) -> tuple[Fields, bytes]:
        """For the landing that it names, and not to be written there."""
        random, tokens = self._random, len(site.request.tokens)
        new = replace(chunk, index=1_000_000 + random.randrange(1000))
        wrong: list[tuple[Fields, bytes]] = [
            (replace(new, box=replace(new.box, tokens=range(tokens + 1))), body),
            (replace(new, box=replace(new.box, tokens=range(2**31, 2**31 + 1))), body),
            (replace(new, box=replace(new.box, layers=range(60000, 60001))), body),
            (replace(new, box=replace(new.box, heads=range(7, 9))), body),
            (replace(new, box=Box(range(LAYOUT.layers), range(1), range(1))), body),
            (replace(new, dtype="bfloat16"), body),
            (new, body[:-1]),
            (new, body + b"\0"),
            (new, b""),
        ]
        if chunk.index in site.written:
            other = bytes(reversed(body)) if body != body[::-1] else b"x" * len(body)
            wrong += [(new, body), (new, other), (chunk, other)]
        return random.choice(wrong)
