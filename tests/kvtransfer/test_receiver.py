"""Receiver: strangers, fuzz and cheats get nowhere and cost nothing."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from cluster import metrics
from cluster.errors import StartError
from cluster.wire.codec import encode_hello
from kvtransfer.frames import (
    MAX_BODY,
    Ack,
    Address,
    Box,
    Buffer,
    Bye,
    Chunk,
    Fields,
    Greeting,
    Nack,
    Refuse,
    Renew,
    Welcome,
    decode,
    encode,
    row_bytes,
)
from kvtransfer.receiver import MAX_HELLO_BYTES, MAX_KNOWN, MAX_STRIKES, MAX_UNANSWERED, Receiver
from tests.kvtransfer.fakes import DECODE_PEER, LAYOUT, PREFILL_PEER, Yes, hello, prefill_hello

ADDRESS = Address("ab" * 16, 1, DECODE_PEER.incarnation, 1)
CHUNK = Chunk(ADDRESS, 0, Box(range(1), range(1), range(1)), "float32")


class Net:
    """Both ends of every route in one place."""

    def __init__(self, credit: int = 1000) -> None:
        self.stage = Yes()
        self.sent: list[tuple[bytes, int, Fields, str]] = []
        self.receiver = Receiver(hello(), self.stage, lambda f, *a: f(*a), credit)
        self.receiver.send = self.send

    def send(self, route: bytes, parts: tuple[Buffer, Buffer]) -> None:
        frame = decode(list(parts))
        text = "" if isinstance(frame.fields, Welcome) else bytes(frame.body).decode()
        self.sent.append((route, frame.serial, frame.fields, text))

    def take(self, route: bytes, fields: Fields, body: bytes = b"", serial: int = 5) -> None:
        self.receiver.take(route, list(encode(serial, fields, body)))

    def greet(self, route: bytes, incarnation: int = PREFILL_PEER.incarnation) -> None:
        mine = prefill_hello(peer=replace(PREFILL_PEER, incarnation=incarnation))
        self.take(route, Greeting(DECODE_PEER.incarnation), encode_hello(mine))


@pytest.fixture
def net() -> Net:
    return Net()


def test_a_frame_of_a_greeted_link_reaches_the_stage_and_its_answer_the_sender(net: Net) -> None:
    net.greet(b"r")
    net.take(b"r", CHUNK, b"body", serial=9)
    assert net.sent == [(b"r", 5, Welcome(1000), ""), (b"r", 9, Ack(), "")]
    assert bytes(net.stage.arrived[0].body) == b"body"


def test_a_greeting_said_twice_ends_no_link(net: Net) -> None:
    net.greet(b"r")
    net.stage.silent = True
    net.take(b"r", CHUNK, b"body", serial=9)
    net.greet(b"r")
    net.stage.arrived[0].reply(Ack(), "")
    assert [sent[2] for sent in net.sent] == [Welcome(1000), Welcome(1000), Ack()]
    assert net.receiver.counters["evicted"] == 0


def test_strangers_reach_nothing_and_are_told(net: Net) -> None:
    net.take(b"r", CHUNK, b"body")
    net.take(b"r", Renew(ADDRESS))
    assert net.stage.arrived == []
    assert net.receiver.counters["fenced"] == 2
    assert [type(fields) for _, _, fields, _ in net.sent] == [Bye, Bye]


def test_a_stranger_gets_no_answer_to_a_damaged_body(net: Net) -> None:
    net.receiver.take(b"r", [encode(1, CHUNK, b"body")[0], b"bodY"])
    assert net.sent == []
    assert net.receiver.counters["damaged"] == net.receiver.counters["bad_frames"] == 1


def test_fuzz_is_dropped_counted_and_cut_after_ten(net: Net) -> None:
    net.greet(b"r")
    random = Random(1)
    for _ in range(500):
        parts = [random.randbytes(random.randrange(120)) for _ in range(random.randrange(4))]
        net.receiver.take(b"r", list(parts))
    assert net.receiver.counters["bad_frames"] == MAX_STRIKES
    assert net.receiver.counters["dropped"] == 500 - MAX_STRIKES
    assert net.sent[1:] == [(b"r", 0, Bye(), "10 bad frames in a row")]
    net.take(b"r", CHUNK)
    net.greet(b"r")
    assert net.stage.arrived == []


def test_a_good_frame_clears_the_record(net: Net) -> None:
    net.greet(b"r")
    for _ in range(3):
        for _ in range(MAX_STRIKES - 1):
            net.receiver.take(b"r", [b"x"])
        net.take(b"r", CHUNK)
    assert len(net.stage.arrived) == 3


def test_every_bit_flip_of_a_chunk_is_refused(net: Net) -> None:
    net.greet(b"r")
    header, body = encode(1, CHUNK, b"0123")
    for bit in range(8 * (len(header) + len(body))):
        damaged = [bytearray(header), bytearray(body)]
        part, place = (0, bit) if bit < 8 * len(header) else (1, bit - 8 * len(header))
        damaged[part][place // 8] ^= 1 << place % 8
        net.receiver.take(b"r", list(damaged))
        net.take(b"r", Renew(ADDRESS))
    assert not [a for a in net.stage.arrived if isinstance(a.fields, Chunk)]
    assert net.receiver.counters["damaged"] == 8 * len(body)
    assert [serial for _, serial, fields, _ in net.sent if fields == Nack()] == [1] * 8 * len(body)


@pytest.mark.parametrize("fields", [Ack(), Nack(), Welcome(5), Refuse()])
def test_answers_are_no_questions(net: Net, fields: Fields) -> None:
    net.greet(b"r")
    net.take(b"r", fields)
    assert net.receiver.counters["bad_frames"] == 1


def test_a_hello_that_is_no_hello_is_a_bad_frame(net: Net) -> None:
    net.take(b"r", Greeting(DECODE_PEER.incarnation), b"\xff\xff")
    assert net.receiver.counters["bad_frames"] == 1
    assert net.sent == []


def test_a_hello_beyond_all_measure_is_a_bad_frame_and_is_not_remembered(net: Net) -> None:
    long = prefill_hello(peer=replace(PREFILL_PEER, name="p" * MAX_HELLO_BYTES))
    net.take(b"r", Greeting(DECODE_PEER.incarnation), encode_hello(long))
    net.take(b"r", Greeting(DECODE_PEER.incarnation), bytes(MAX_BODY))
    assert net.receiver.counters["bad_frames"] == 2
    assert net.sent == []


def test_who_overdraws_its_credit_is_cut(net: Net) -> None:
    net.greet(b"r")
    net.stage.silent = True
    for _ in range(8):
        net.take(b"r", CHUNK, bytes(250))
    net.take(b"r", CHUNK, b"x")
    assert len(net.stage.arrived) == 8
    assert net.sent[-1] == (b"r", 0, Bye(), "credit of 1000 bytes overdrawn")
    assert net.receiver.counters["overdrawn"] == 1
    answered = len(net.sent)
    for arrived in net.stage.arrived:
        arrived.reply(Ack(), "")
    assert len(net.sent) == answered


def test_a_frame_that_comes_again_over_a_full_window_cuts_nobody(net: Net) -> None:
    net.greet(b"r")
    net.stage.silent = True
    net.take(b"r", CHUNK, bytes(1000))
    net.take(b"r", CHUNK, bytes(1000))
    assert len(net.stage.arrived) == 2 and net.receiver.counters["overdrawn"] == 0


def test_empty_frames_are_bounded_too(net: Net) -> None:
    net.greet(b"r")
    net.stage.silent = True
    for _ in range(MAX_UNANSWERED):
        net.take(b"r", Renew(ADDRESS))
    net.take(b"r", Renew(ADDRESS))
    assert len(net.stage.arrived) == MAX_UNANSWERED
    assert net.receiver.counters["overdrawn"] == 1


def test_answered_bytes_are_credit_again(net: Net) -> None:
    net.greet(b"r")
    for _ in range(10):
        net.take(b"r", CHUNK, bytes(1000))
    assert len(net.stage.arrived) == 10


def test_memory_stays_flat_whoever_calls(net: Net) -> None:
    for number in range(3 * MAX_KNOWN):
        route = number.to_bytes(4, "little")
        net.receiver.take(route, [b"junk"])
        net.greet(route, incarnation=number + 1)
        net.take(route, Bye())
        net.greet(route, incarnation=10**6 + number)
    known = (net.receiver._links, net.receiver._strikes)
    assert all(len(table) <= MAX_KNOWN for table in known)


def test_many_names_are_kept_up_to_a_limit_the_quietest_goes(net: Net) -> None:
    for number in range(MAX_KNOWN + 1):
        mine = prefill_hello(peer=replace(PREFILL_PEER, name=f"p{number}"))
        route = number.to_bytes(4, "little")
        net.take(route, Greeting(DECODE_PEER.incarnation), encode_hello(mine))
    net.take((0).to_bytes(4, "little"), CHUNK)
    assert net.receiver.counters["fenced"] == 1
    net.take((1).to_bytes(4, "little"), CHUNK)
    assert len(net.stage.arrived) == 1


def test_each_dropped_frame_and_ended_link_is_told_under_one_reason(net: Net) -> None:
    net.take(b"r", CHUNK, b"body")
    net.greet(b"r")
    net.receiver.take(b"r", [b"junk"])
    net.receiver.take(b"r", [encode(1, CHUNK, b"body")[0], b"bodY"])
    net.greet(b"s", incarnation=12)
    stranger = replace(prefill_hello(), protocol=99)
    net.take(b"r", Greeting(DECODE_PEER.incarnation), encode_hello(stranger))
    net.stage.silent = True
    net.take(b"s", CHUNK, bytes(2001))
    net.take(b"s", CHUNK)
    told = dict(net.receiver.metrics())
    frames = {"malformed": 1, "damaged": 1, "fenced": 1, "cut": 1}
    links = {"refused": 1, "evicted": 1, "overdrawn": 1, "keyless": 0, "other_user": 0}
    assert told == {
        **{metrics.labelled(metrics.BAD_FRAMES, reason=why): n for why, n in frames.items()},
        **{metrics.labelled(metrics.LINKS_ENDED, reason=why): n for why, n in links.items()},
    }


def test_credit_for_less_than_the_smallest_chunk_is_refused_at_the_start() -> None:
    least = row_bytes(LAYOUT)
    Net(least)
    with pytest.raises(StartError, match=f"--credit-bytes {least - 1} is too small.* {least}"):
        Net(least - 1)
