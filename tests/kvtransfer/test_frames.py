"""Frames: what is encoded comes back, and nothing else is ever accepted."""

from __future__ import annotations

from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import HandshakeRefused
from kvtransfer.frames import (
    DTYPES,
    MAGIC,
    MAX_BODY,
    Ack,
    Address,
    BadFrame,
    Box,
    Bye,
    Chunk,
    DamagedBody,
    Fields,
    Greeting,
    Manifest,
    Nack,
    Refuse,
    Reject,
    Renew,
    Sealed,
    Welcome,
    combined,
    decode,
    digest_of,
    encode,
)

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
u16 = st.integers(0, 2**16 - 1)


def ranges(bound: int) -> st.SearchStrategy[range]:
    pairs = st.tuples(st.integers(0, bound), st.integers(0, bound)).filter(lambda p: p[0] != p[1])
    return pairs.map(lambda pair: range(min(pair), max(pair)))


addresses = st.builds(Address, st.binary(min_size=16, max_size=16).map(bytes.hex), u64, u64, u32)
boxes = st.builds(Box, ranges(2**16 - 1), ranges(2**16 - 1), ranges(2**32 - 1))
bodiless = st.one_of(
    st.builds(Renew, addresses),
    st.builds(
        Manifest, addresses, u32, ranges(2**32 - 1), st.binary(min_size=16, max_size=16)
    ),
    st.sampled_from([Ack(), Nack(), Sealed()]),
)  # fmt: skip
with_body = st.one_of(
    st.builds(Greeting, u64),
    st.builds(Welcome, u64),
    st.builds(Chunk, addresses, u32, boxes, st.sampled_from(DTYPES)),
    st.sampled_from([Refuse(), Reject(), Bye()]),
)
messages = st.one_of(
    st.tuples(bodiless, st.just(b"")), st.tuples(with_body, st.binary(max_size=200))
)


@given(u64, messages)
def test_what_is_encoded_comes_back(serial: int, message: tuple[Fields, bytes]) -> None:
    fields, body = message
    frame = decode(list(encode(serial, fields, body)))
    assert (frame.serial, frame.fields, bytes(frame.body)) == (serial, fields, body)
    assert frame.digest == digest_of(body)


@given(u64, messages, st.data())
def test_one_flipped_bit_is_never_accepted(
    serial: int, message: tuple[Fields, bytes], data: st.DataObject
) -> None:
    header, body = map(bytearray, encode(serial, *message))
    part = body if body and data.draw(st.booleans()) else header
    bit = data.draw(st.integers(0, 8 * len(part) - 1))
    part[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadFrame) as raised:
        decode([header, body])
    if part is body:
        assert isinstance(raised.value, DamagedBody)
        assert raised.value.serial == serial


@given(u64, messages, st.data())
def test_a_cut_or_longer_frame_is_never_accepted(
    serial: int, message: tuple[Fields, bytes], data: st.DataObject
) -> None:
    parts = list(map(bytes, encode(serial, *message)))
    which = data.draw(st.integers(0, 1))
    keep = data.draw(st.integers(0, len(parts[which])))
    tail = data.draw(st.binary(min_size=0 if keep < len(parts[which]) else 1, max_size=3))
    changed = parts[which][:keep] + tail
    if changed == parts[which]:
        return
    parts[which] = changed
    with pytest.raises(BadFrame):
        decode(parts)  # type: ignore[arg-type]


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_random_bytes_are_never_accepted(parts: list[bytes]) -> None:
    with pytest.raises(BadFrame):
        decode(parts)  # type: ignore[arg-type]


@given(st.binary(max_size=300), st.integers(0, 12), st.binary(max_size=50))
def test_random_bytes_under_a_good_prefix_are_never_accepted(
    rest: bytes, kind: int, body: bytes
) -> None:
    header = MAGIC + (1).to_bytes(2, "little") + kind.to_bytes(2, "little") + rest
    with pytest.raises(BadFrame):
        decode([header, body])


BACKWARD = Manifest.WIRE.pack(bytes(16), 1, 1, 1, 0, 2, 1, bytes(16))
UNKNOWN_DTYPE = Chunk.WIRE.pack(bytes(16), 1, 1, 1, 0, 0, 1, 0, 1, 0, 1, 99)


@pytest.mark.parametrize(
    ("kind", "fields", "body"),
    [
        pytest.param(99, b"", b"", id="unknown kind"),
        pytest.param(7, b"x", b"", id="fields where there are none"),
        pytest.param(7, b"", b"x", id="body where there is none"),
        pytest.param(4, b"", b"", id="chunk without fields"),
        pytest.param(4, bytes(Chunk.WIRE.size), b"", id="empty ranges"),
        pytest.param(4, UNKNOWN_DTYPE, b"", id="unknown dtype"),
        pytest.param(6, BACKWARD, b"", id="backward range"),
    ],
)
def test_an_impossible_frame_is_bad_though_its_digests_fit(
    kind: int, fields: bytes, body: bytes
) -> None:
    class Odd(Fields):
        KIND = kind
        WIRE = Struct(f"{len(fields)}s")

        def values(self) -> tuple[bytes]:
            return (fields,)

    with pytest.raises(BadFrame) as raised:
        decode(list(encode(1, Odd(), body)))
    assert not isinstance(raised.value, DamagedBody)


def test_another_version_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.frames.VERSION", 7)
    parts = encode(1, Ack())
    monkeypatch.undo()
    with pytest.raises(HandshakeRefused, match="version 7 meets 1"):
        decode(list(parts))


def test_a_body_over_the_limit_is_not_sent() -> None:
    with pytest.raises(AssertionError, match="bytes"):
        encode(1, Bye(), bytes(MAX_BODY + 1))


def test_the_combined_digest_knows_no_order_but_every_index_and_digest() -> None:
    entries = [(0, 5), (1, 6), (2, 7)]
    assert combined(entries) == combined(reversed(entries))
    others = [entries[:2], [(0, 6), (1, 5), (2, 7)], [(0, 5), (1, 6), (3, 7)], []]
    assert len({combined(entries), *map(combined, others)}) == 5
