"""Frames: the one description of what travels between two workers' data planes.

A frame is two parts, header and body; all integers are little-endian. The header is a prefix,
which no version will change,

    magic          4 bytes  "BATN"
    version        u16      VERSION; another one is not read further
    kind           u16      which of the classes below the fields belong to
    serial         u64      a question's own number on its link; in an answer, that of the question
    body length    u64      at most MAX_BODY
    body digest    u64      xxh3_64 of the body
    header digest  u64      xxh3_64 of the prefix before this field, then the fields

then the fields of the kind, as its class lists them in `WIRE`. There are two digests and not one
so that a damaged body still leaves a serial that can be trusted: the answer NACK then names the
very frame that is to come again. The body digests also make up the manifest's digest.

    HELLO     sender -> receiver   body: protobuf Hello of the sender
    WELCOME   receiver -> sender   body: protobuf Hello of the receiver
    REFUSE    receiver -> sender   body: the reason in UTF-8, both values in it; no link
    CHUNK     sender -> receiver   body: KV [layers, 2, tokens, kv_heads, head_dim]
    RENEW     sender -> receiver   the handoff goes on: keep the landing's lease alive
    MANIFEST  sender -> receiver   every chunk was sent; answered when judged
    ACK       receiver -> sender   CHUNK: written. RENEW: renewed. MANIFEST: chunks are missing
    NACK      receiver -> sender   the body arrived damaged: send it again
    SEALED    receiver -> sender   MANIFEST: the landing is complete and belongs to the decoder
    REJECT    receiver -> sender   body: the reason; stale or impossible, so stop this handoff
    BYE       either way           this link is over; body: the reason
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Any, ClassVar, NamedTuple

import xxhash

from cluster.config import MAX_BODY_BYTES
from cluster.errors import HandshakeRefused
from cluster.messages import KVLayout
from engine.staging import Body, DeviceBody, Digested

VERSION = 1
MAGIC = b"BATN"
MAX_BODY = MAX_BODY_BYTES
DTYPES = ("float32", "float16", "bfloat16")
"""A dtype's code on the wire is its place here."""
_ITEM_BYTES = (4, 2, 2)

Buffer = Body
Digest = Callable[[Buffer], int]

_PREFIX = Struct("<4sHHQQQ")
_DIGEST = Struct("<Q")
_ENTRY = Struct("<IQ")


class BadFrame(Exception):
    """Bytes that are no frame of ours. The peer is at fault; nothing was done with them."""


class DamagedBody(BadFrame):
    """The header is whole and the body is not: `serial` says which frame to ask for again."""

    def __init__(self, serial: int) -> None:
        super().__init__("body does not match its digest")
        self.serial = serial


class Address(NamedTuple):
    """Which writer of which landing: any part out of date makes a frame stale (R6)."""

    landing: str  # 32 hex digits
    generation: int
    incarnation: int  # of the worker that promised it
    attempt: int

    def values(self) -> tuple[bytes, int, int, int]:
        return bytes.fromhex(self.landing), self.generation, self.incarnation, self.attempt

    @classmethod
    def of(cls, landing: bytes, generation: int, incarnation: int, attempt: int) -> Address:
        return cls(landing.hex(), generation, incarnation, attempt)


@dataclass(frozen=True, slots=True)
class Box:
    """A range of layers x kv-heads x tokens, none of them empty."""

    layers: range
    heads: range
    tokens: range

    @property
    def cells(self) -> int:
        return len(self.layers) * len(self.heads) * len(self.tokens)


class Fields:
    """What the header of one kind holds beyond the prefix; by itself, nothing."""

    KIND: ClassVar[int]
    WIRE: ClassVar[Struct] = Struct("")

    def values(self) -> tuple[Any, ...]:
        """What `WIRE` packs."""
        return ()

    @classmethod
    def of(cls, *values: Any) -> Fields:
        """From what `WIRE` unpacked. Raises BadFrame."""
        return cls(*values)


@dataclass(frozen=True, slots=True)
class Greeting(Fields):
    """HELLO."""

    KIND = 1
    WIRE = Struct("<Q")
    incarnation: int  # which start of the receiver the sender means

    def values(self) -> tuple[Any, ...]:
        return (self.incarnation,)


@dataclass(frozen=True, slots=True)
class Welcome(Fields):
    KIND = 2
    WIRE = Struct("<Q")
    credit: int  # bytes of chunk bodies that may be unanswered at any time

    def values(self) -> tuple[Any, ...]:
        return (self.credit,)


@dataclass(frozen=True, slots=True)
class Refuse(Fields):
    KIND = 3


@dataclass(frozen=True, slots=True)
class Chunk(Fields):
    """KV of one box. Chunks of a handoff are numbered from 0 and may come in any order."""

    KIND = 4
    WIRE = Struct("<16sQQIIHHHHIIH")
    address: Address
    index: int
    box: Box
    dtype: str

    def values(self) -> tuple[Any, ...]:
        box = self.box
        ranges = (box.layers, box.heads, box.tokens)
        borders = (border for part in ranges for border in (part.start, part.stop))
        return *self.address.values(), self.index, *borders, DTYPES.index(self.dtype)

    @classmethod
    def of(cls, *values: Any) -> Chunk:
        *address, index, l0, l1, h0, h1, t0, t1, dtype = values
        if not (l0 < l1 and h0 < h1 and t0 < t1):
            raise BadFrame("empty range")
        if dtype >= len(DTYPES):
            raise BadFrame("unknown dtype")
        box = Box(range(l0, l1), range(h0, h1), range(t0, t1))
        return cls(Address.of(*address), index, box, DTYPES[dtype])


@dataclass(frozen=True, slots=True)
class Renew(Fields):
    KIND = 5
    WIRE = Struct("<16sQQI")
    address: Address

    def values(self) -> tuple[Any, ...]:
        return self.address.values()

    @classmethod
    def of(cls, *values: Any) -> Renew:
        return cls(Address.of(*values))


@dataclass(frozen=True, slots=True)
class Manifest(Fields):
    """What the whole handoff consists of: `digest` is `combined` of its chunks' bodies."""

    KIND = 6
    WIRE = Struct("<16sQQIIII16s")
    address: Address
    chunks: int
    tokens: range  # may be empty: the receiver had everything
    digest: bytes

    def values(self) -> tuple[Any, ...]:
        tokens = self.tokens
        return *self.address.values(), self.chunks, tokens.start, tokens.stop, self.digest

    @classmethod
    def of(cls, *values: Any) -> Manifest:
        *address, chunks, start, stop, digest = values
        if start > stop:
            raise BadFrame("backward range")
        return cls(Address.of(*address), chunks, range(start, stop), digest)


@dataclass(frozen=True, slots=True)
class Ack(Fields):
    KIND = 7


@dataclass(frozen=True, slots=True)
class Nack(Fields):
    KIND = 8


@dataclass(frozen=True, slots=True)
class Sealed(Fields):
    KIND = 9


@dataclass(frozen=True, slots=True)
class Reject(Fields):
    KIND = 10


@dataclass(frozen=True, slots=True)
class Bye(Fields):
    KIND = 11


_KINDS: dict[int, type[Fields]] = {
    kind.KIND: kind
    for kind in (
        Greeting, Welcome, Refuse, Chunk, Renew, Manifest, Ack, Nack, Sealed, Reject, Bye
    )
}  # fmt: skip
_BODILESS = (Renew, Manifest, Ack, Nack, Sealed)


class Frame(NamedTuple):
    """A frame that was proven intact."""

    serial: int
    fields: Fields
    body: Buffer
    digest: int  # of the body


def row_bytes(layout: KVLayout) -> int:
    """The least that a body must have room for: one token of one layer, in the widest group."""
    widest = max(group.kv_heads * group.head_dim for group in layout.groups)
    return 2 * widest * _ITEM_BYTES[DTYPES.index(layout.dtype)]


def digest_of(body: Buffer) -> int:
    """Of a body that was digested on its way here, as on a device, what was found then."""
    if isinstance(body, DeviceBody | Digested):
        return body.digest
    return int(xxhash.xxh3_64_intdigest(body))


def combined(digests: Iterable[tuple[int, int]]) -> bytes:
    """The digest in a manifest, of (chunk index, body digest) in any order."""
    total = xxhash.xxh3_128()
    for index, digest in sorted(digests):
        total.update(_ENTRY.pack(index, digest))
    return bytes(total.digest())


def encode(
    serial: int, fields: Fields, body: Buffer = b"", digest: int | None = None
) -> tuple[bytes, Buffer]:
    """The two parts. `digest` is the body's where it is known already."""
    assert len(body) <= MAX_BODY, f"a body of {len(body)} bytes"
    if digest is None:
        digest = digest_of(body)
    prefix = _PREFIX.pack(MAGIC, VERSION, fields.KIND, serial, len(body), digest)
    packed = fields.WIRE.pack(*fields.values())
    return prefix + _DIGEST.pack(digest_of(prefix + packed)) + packed, body


def decode(parts: list[Buffer], chunk_digest: Digest = digest_of) -> Frame:
    """Raises BadFrame for anything that `encode` cannot have made, whatever it is.

    Raises HandshakeRefused when only the version differs, and the peer deserves to be told so.
    """
    if len(parts) != 2:
        raise BadFrame(f"{len(parts)} parts")
    header, body = bytes(parts[0]), parts[1]
    start = _PREFIX.size + _DIGEST.size
    if len(header) < start:
        raise BadFrame("short header")
    magic, version, number, serial, length, digest = _PREFIX.unpack_from(header)
    if magic != MAGIC:
        raise BadFrame("wrong magic")
    packed = header[start:]
    if _DIGEST.unpack_from(header, _PREFIX.size)[0] != digest_of(header[: _PREFIX.size] + packed):
        raise BadFrame("header does not match its digest")
    if version != VERSION:
        raise HandshakeRefused(f"data plane version {version} meets {VERSION}")
    kind = _KINDS.get(number)
    if kind is None:
        raise BadFrame("unknown kind")
    if len(packed) != kind.WIRE.size:
        raise BadFrame("wrong header size")
    if length > MAX_BODY or (length and kind in _BODILESS):
        raise BadFrame("body too long")
    fields = kind.of(*kind.WIRE.unpack(packed))
    found = chunk_digest if kind is Chunk else digest_of
    if len(body) != length or found(body) != digest:
        raise DamagedBody(serial)
    return Frame(serial, fields, body, digest)
