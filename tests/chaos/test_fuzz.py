"""Fuzzing: whatever a parser is given, it returns, or raises what it says it raises; and soon."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import config
from cluster.errors import BadModel, BadRequest, HandshakeRefused, NotFound, StartError, WorkerLost
from cluster.fields import read_object
from cluster.messages import (
    Cancel,
    Failed,
    Generate,
    Load,
    Prefill,
    Promise,
    Promised,
    Report,
    Request,
    Sampling,
    Start,
    Token,
)
from cluster.wire import codec
from cluster.wire import inference_pb2 as wire
from engine.weights import read_header
from gateway import keys, validate
from gateway.ask import Limits
from gateway.inference import to_fields
from gateway.parse import parse_json
from kvtransfer.frames import (
    Ack,
    Address,
    BadFrame,
    Box,
    Chunk,
    Greeting,
    Manifest,
    Reject,
    Welcome,
    decode,
    encode,
)
from kvtransfer.link import FramedLink
from kvtransfer.near import _message
from kvtransfer.shared_memory import SharedMemoryWire
from tests.gateway.fakes import FakeSequencer, make_gateway, says
from tests.gateway.scripted import hello, landing
from tests.gateway.test_connection import raw, request, served
from tests.kvtransfer.fakes import DECODE_PEER, prefill_hello

MOST_BYTES = 64 << 20
"""What a parser may take for a piece of some hundred bytes, whatever lengths are named in it: more
than the process ever had before."""

pytestmark = pytest.mark.timeout(1800)

LIMITS = Limits(("m",), 1000, 200, 199)
ADDRESS = Address("ab" * 16, 1, 2, 3)
SAMPLING = Sampling(5, logit_bias=((3, 1.5),), stop_token_ids=(7,), logprobs=2)
ASK = Request("id", (1, 2, 300), SAMPLING, b"salt", 1)
LOAD = Load(5, 1, 2, 3, counters=(("a", 1.0), ("b", 2.5)))
EVENTS = Report(
    (
        Token("id", 1, 2, 3, "stop", 4, ((3, -0.5),), (("step", 0.1),), 2),
        Promised("id", 1, landing()),
        Failed("id", 1, "full", "no room"),
    )
)
INFERENCE = [
    wire.GenerateRequest(model="m", prompt="Hi", max_tokens=3, stop=["x"], logit_bias={3: 1.0}),
    wire.GenerateRequest(model="m", prompt_token_ids=wire.TokenIds(ids=[1, 2]), logprobs=1, n=2),
]
BODY = {"model": "m", "prompt": "Hi", "max_tokens": 3, "logit_bias": {"3": 1}, "stop": ["a"]}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi \ud83d"[:3]}], "seed": 5}
KEYS = "- key_sha256: " + "5e" * 32 + "\n  tenant: a\n  weight: 2.0\n  models: [x, y]\n"
YAML = "max-num-seqs: 5\nrole: decode\njoin: [a, b]\nlease: 2.5\npin: [1, 2]\n"
HEADER = b'{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"__metadata__":{"x":"y"}}'


@dataclass(frozen=True)
class Parser:
    """`parse` gets bytes and may raise `errors`. What it takes, `again` makes bytes of."""

    parse: Callable[[bytes], Any]
    errors: tuple[type[Exception], ...]
    seeds: list[bytes]
    again: Callable[[Any], bytes] | None = None


def orders() -> list[bytes]:
    given = [
        Promise(ASK), Prefill(ASK, landing(), 2), Prefill(ASK, None), Start("id", 5, 2),
        Generate(ASK), Cancel("id", 3),
    ]  # fmt: skip
    return [codec.encode_order(order) for order in given]


def frames() -> list[bytes]:
    """Each as the length of its header, header, body."""
    box = Box(range(2), range(1), range(3, 9))
    made = [
        encode(1, Greeting(5), codec.encode_hello(hello("p", "prefill"))),
        encode(2, Chunk(ADDRESS, 3, box, "float16"), b"12345678"),
        encode(3, Manifest(ADDRESS, 3, range(9), bytes(16))),
        encode(4, Ack()),
        encode(5, Reject(), b"stale"),
        encode(6, Welcome(1 << 20), b"x"),
    ]
    return [bytes([len(head)]) + head + bytes(body) for head, body in made]


def parse_frame(data: bytes) -> Any:
    length = data[0] if data else 0
    return decode([data[1 : 1 + length], data[1 + length :]])


def call(validator: Callable[[Any, Limits], Any]) -> Callable[[bytes], Any]:
    return lambda data: validator(parse_json(data), LIMITS)


def of_file(parse: Callable[[Path], Any], name: str) -> Callable[[bytes], Any]:
    """`FOLDER` is this test's own."""

    def read(data: bytes) -> Any:
        path = FOLDER[-1] / name
        path.write_bytes(data)
        return parse(path)

    return read


FOLDER: list[Path] = []

REFUSED = (BadRequest, NotFound)
PARSERS = {
    "frame": Parser(parse_frame, (BadFrame, HandshakeRefused), frames()),
    "order": Parser(codec.decode_order, (ValueError,), orders(), codec.encode_order),
    "report": Parser(
        codec.decode_report, (ValueError,), [codec.encode_report(EVENTS)], codec.encode_report
    ),
    "membership": Parser(
        codec.decode_membership,
        (ValueError,),
        [codec.encode_membership(hello("p", "prefill")), codec.encode_membership(LOAD)],
        codec.encode_membership,
    ),
    "hello": Parser(
        codec.decode_hello,
        (ValueError,),
        [codec.encode_hello(hello("p", "prefill"))],
        codec.encode_hello,
    ),
    "welcome": Parser(
        codec.decode_welcome, (ValueError,), [codec.encode_welcome("g")], codec.encode_welcome
    ),
    "grpc": Parser(
        lambda data: to_fields(data, longest=200),
        REFUSED,
        [message.SerializeToString() for message in INFERENCE],
    ),
    "completion": Parser(call(validate.completion), REFUSED, [json.dumps(BODY).encode()]),
    "chat": Parser(call(validate.chat), REFUSED, [json.dumps(CHAT).encode()]),
    "tokenize": Parser(call(validate.tokenize), REFUSED, [b'{"model":"m","prompt":"a b"}']),
    "detokenize": Parser(call(validate.detokenize), REFUSED, [b'{"model":"m","tokens":[1,2]}']),
    "keys": Parser(of_file(keys.read, "keys"), (StartError,), [KEYS.encode(), b"one\ntwo\n"]),
    "config": Parser(
        of_file(
            lambda path: config.load(config.WorkerConfig, ["--config", str(path)], "baton"), "yaml"
        ),
        (StartError,),
        [YAML.encode()],
    ),
    "weights": Parser(
        of_file(read_header, "model.safetensors"),
        (BadModel,),
        [struct.pack("<Q", len(HEADER)) + HEADER + bytes(8)],
    ),
    "json": Parser(of_file(read_object, "config.json"), (BadModel,), [b'{"a":[1,{"b":2.5}]}']),
}

ODD = [
    b"", b"\0", b"\xff" * 9, b"\xff" * 9 + b"\x01", b"\xfe\xff", b"1e999", b"NaN", b"-0",
    b"[" * 1100, b"{" * 50, b'"' * 3, b"\\ud800", b"9" * 5000, b"&a [*a]",
    b"!!timestamp x", b"!!bool x", b"2001-99-99", b"!!int x", b"<<: 5",
    b"? [a]\n: b", b"0x", b"\x85", b"---\n...\n---",
    b"\xe2\x80\xa8", b"null", b"\xef\xbb\xbf", b"%s%n", b"../../x", b"- ", b"\r\n",
]  # fmt: skip
"""What has broken parsers before."""


@st.composite
def mangled(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid piece with some things done to it, or no such thing at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(
            st.integers(start, min(len(data), start + draw(st.sampled_from([0, 1, 8, 99]))))
        )
        put = draw(
            st.sampled_from(ODD)
            | st.binary(max_size=9)
            | st.sampled_from(seeds).flatmap(
                lambda other: st.integers(0, len(other)).map(lambda cut: other[cut:])
            )
        )
        data = data[:start] + put + data[stop:]
    return data


Fuzz = Callable[..., None]


@pytest.fixture
def fuzz(chaos_full: bool) -> Fuzz:
    """Runs a property on many examples: the same ones each time, or many more, and new ones."""

    def run(check: Callable[..., None], *inputs: st.SearchStrategy[Any], examples: int) -> None:
        rules = settings(
            max_examples=examples * (60 if chaos_full else 1),
            derandomize=not chaos_full,
            deadline=5000,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        given(*inputs)(rules(check))()

    return run


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_raises_what_it_says_and_nothing_else(
    name: str, fuzz: Fuzz, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parser = PARSERS[name]
    FOLDER.append(tmp_path)
    caplog.set_level(logging.CRITICAL)

    def check(data: bytes) -> None:
        try:
            found = parser.parse(data)
        except parser.errors as error:
            assert len(str(error)) < 10_000
            return
        if parser.again is not None:
            again = parser.parse(parser.again(found))
            assert repr(again) == repr(found)  # floats that are no numbers equal nothing

    before = 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    for seed in parser.seeds:
        parser.parse(seed)
        for odd in ODD:
            for data in (odd, b"- " + odd, b"a: " + odd, seed + odd, odd + seed):
                check(data)
    fuzz(check, mangled(parser.seeds), examples=60)
    assert 1024 * getrusage(RUSAGE_SELF).ru_maxrss - before < MOST_BYTES
    FOLDER.pop()


async def test_whatever_answers_a_sender_ends_its_link_at_worst(chaos_full: bool) -> None:
    """What a decode worker may say to a prefill worker, over sockets of this machine and others."""
    random = Random(7)
    seeds = frames()
    for _ in range(60_000 if chaos_full else 1000):
        near = SharedMemoryWire(DECODE_PEER)
        link = FramedLink(near, prefill_hello(), DECODE_PEER)
        near._received, near._lost = link._received, link._lose
        for _ in range(random.randrange(1, 4)):
            data = bytearray(random.choice(seeds))
            head, body = bytes(data[1 : 1 + data[0]]), bytes(data[1 + data[0] :])
            message = bytearray(_message((head, body)))
            if random.random() < 0.7:
                message = message[: random.randrange(len(message) + 1)]
            for _ in range(random.randrange(3)):
                if message:
                    message[random.randrange(len(message))] = random.getrandbits(8)
            near._take(bytes(message))
        if link.lost:
            with pytest.raises((WorkerLost, HandshakeRefused)):
                link._check()
        link.close()


HEADS = [
    request(),
    request("1.0"),
    b"GET /live HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    b'Transfer-Encoding: chunked\r\n\r\n6\r\n{"prom\r\nA\r\npt":"a b"}\n\r\n0\r\n\r\n',
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n",
]
PIECES = [
    b"\r\n", b"\n", b"\r\n\r\n", b" ", b"\0", b"\xff", b":", b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"HTTP/9.9", b"GET ",
    b"ffffffffffffffff\r\n", b"-1\r\n", b"Upgrade: websocket\r\nConnection: upgrade\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"%00", b"/../", b"?" * 99, b"A" * 3000, b"Content-Length: 99999999999999999999\r\n",
]  # fmt: skip


def mangled_head(random: Random) -> bytes:
    data = random.choice(HEADS)
    for _ in range(random.randrange(1, 5)):
        start = random.randrange(len(data) + 1)
        stop = start + random.choice([0, 0, 1, 5])
        data = data[:start] + random.choice(PIECES) + data[stop:]
    return data


async def test_the_http_port_answers_or_hangs_up(
    chaos_full: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random = Random(11)
    gateway = make_gateway(tmp_path, FakeSequencer(says("fine")))
    gateway.text.start()
    caplog.set_level(logging.ERROR)

    async def talk(port: int, data: bytes) -> bytes:
        """All that comes back when `data` has come in pieces and then no more."""
        with socket.socket() as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", port))
            answer = b""
            with suppress(ConnectionError):
                while data:
                    cut = random.choice([1, 7, 100, len(data)])
                    await loop.sock_sendall(client, data[:cut])
                    data = data[cut:]
                with suppress(TimeoutError):  # it may rightly wait for more
                    async with asyncio.timeout(0.05):
                        answer += await loop.sock_recv(client, 1 << 16)
                with suppress(OSError):  # it may have hung up
                    client.shutdown(socket.SHUT_WR)
                async with asyncio.timeout(20):
                    while piece := await loop.sock_recv(client, 1 << 16):
                        answer += piece
            return answer

    statuses: Counter[bytes] = Counter()
    async with served(gateway) as port:
        for _ in range(2000 if chaos_full else 25):
            for answer in await asyncio.gather(
                *(talk(port, mangled_head(random)) for _ in range(10))
            ):
                assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:99]
                assert answer[9:12] < b"500", answer
                statuses[answer[9:12]] += 1
        assert statuses.keys() >= {b"", b"200", b"400"}
        assert await raw(port, request(), lambda data: b"[DONE]" in data)
    gateway.text.stop()
    assert not [record.getMessage() for record in caplog.records], caplog.text
