from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import (
    Cancel,
    Failed,
    Fingerprint,
    Generate,
    Hello,
    KVLayout,
    Landing,
    LayerGroup,
    Load,
    Peer,
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
from cluster.wire import control_pb2 as pb

U32 = st.integers(0, 2**32 - 1)
REALS = st.floats(allow_nan=False, allow_infinity=False)
PAIRS = st.lists(st.tuples(U32, REALS), max_size=3).map(tuple)
SAMPLING = st.builds(
    Sampling,
    max_tokens=U32,
    min_tokens=U32,
    temperature=REALS,
    top_p=REALS,
    top_k=U32,
    min_p=REALS,
    presence_penalty=REALS,
    frequency_penalty=REALS,
    repetition_penalty=REALS,
    logit_bias=PAIRS,
    seed=st.integers(0, 2**64 - 1),
    choice=U32,
    stop_token_ids=st.lists(U32, max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
REQUESTS = st.builds(
    Request,
    id=st.text(max_size=32),
    tokens=st.lists(U32, max_size=5).map(tuple),
    sampling=SAMPLING,
    salt=st.binary(max_size=8),
    emitted=U32,
)
PEERS = st.builds(Peer, st.text(max_size=5), st.integers(0, 2**64 - 1))
LANDINGS = st.builds(
    Landing, st.text(max_size=32), st.integers(0, 2**64 - 1), PEERS, st.text(max_size=9), U32, REALS
)
ORDERS = st.one_of(
    st.builds(Promise, REQUESTS, U32),
    st.builds(Prefill, REQUESTS, st.none() | LANDINGS, U32),
    st.builds(Start, st.text(max_size=5), U32, U32),
    st.builds(Generate, REQUESTS, U32),
    st.builds(Cancel, st.text(max_size=5), U32),
)
TOKENS = st.builds(
    Token,
    request_id=st.text(max_size=5),
    attempt=U32,
    index=U32,
    token=U32,
    finish=st.sampled_from(["", "stop", "length"]),
    stop_token=st.none() | U32,
    logprobs=PAIRS,
    spans=st.just(()) | st.tuples(st.tuples(st.text(max_size=5), REALS)),
    cached_tokens=U32,
)
EVENTS = st.one_of(
    TOKENS,
    st.tuples(st.text(max_size=5), U32, U32, U32).map(lambda row: Token(*row)),
    st.builds(Promised, st.text(max_size=5), U32, LANDINGS),
    st.builds(Failed, st.text(max_size=5), U32, st.text(max_size=5), st.text(max_size=5)),
)
HELLO = Hello(
    Peer("p", 7),
    "prefill",
    "m",
    Fingerprint("c", "w"),
    KVLayout((LayerGroup(2, 1, 64, 0), LayerGroup(1, 1, 64, 128)), "bfloat16"),
    control_address="127.0.0.1:1",
    data_address="tcp://127.0.0.1:2",
    block_size=16,
    blocks=9,
    max_model_len=128,
)


@given(ORDERS)
def test_orders_survive_the_wire(order: Any) -> None:
    assert codec.decode_order(codec.encode_order(order)) == order


@given(st.lists(EVENTS, max_size=4))
def test_reports_survive_the_wire(events: list[Any]) -> None:
    report = Report(tuple(events))
    assert codec.decode_report(codec.encode_report(report)) == report


def test_tokens_with_nothing_else_to_tell_take_no_message_each() -> None:
    plain = [Token("abc", 1, index, 7) for index in range(100)]
    ending = Token("abc", 1, 100, 7, "stop")
    report = Report((*plain, ending, *plain))
    data = codec.encode_report(report)
    assert codec.decode_report(data) == report
    assert len(pb.Report.FromString(data).events) == 3


def test_a_row_of_tokens_that_lacks_one_is_refused() -> None:
    row = pb.Tokens(request_ids=["a", "b"], attempts=[1, 1], indices=[0, 1], tokens=[7])
    with pytest.raises(ValueError, match="shorter"):
        codec.decode_report(pb.Report(events=[pb.Event(tokens=row)]).SerializeToString())


def test_membership_survives_the_wire() -> None:
    load = Load(1, 2, 3, 4, 5, 6, 7, 8, True, (("a", 1.5), ("b", 2.0)))
    for message in (HELLO, load):
        assert codec.decode_membership(codec.encode_membership(message)) == message
    assert codec.decode_hello(codec.encode_hello(HELLO)) == HELLO
    assert codec.decode_welcome(codec.encode_welcome("gw")) == "gw"


def test_no_field_is_forgotten() -> None:
    """Every field of a Hello reaches the other side, whichever of them changes."""
    changed = {"peer": Peer("q", 1), "layout": KVLayout((), "float32")}
    changed["fingerprint"] = Fingerprint("x", "y")
    for field in dataclasses.fields(HELLO):
        value = getattr(HELLO, field.name)
        other = changed.get(field.name, value + 1 if isinstance(value, int) else f"{value}!")
        hello = dataclasses.replace(HELLO, **{field.name: other})
        assert codec.decode_hello(codec.encode_hello(hello)) == hello != HELLO


@given(st.binary(min_size=1, max_size=60))
def test_arbitrary_bytes_are_a_value_error_or_a_message(data: bytes) -> None:
    for decode in (
        codec.decode_order,
        codec.decode_report,
        codec.decode_membership,
        codec.decode_hello,
    ):
        try:
            decode(data)
        except ValueError:
            continue


def test_empty_orders_are_refused() -> None:
    for decode in (codec.decode_order, codec.decode_membership):
        with pytest.raises(ValueError):
            decode(b"")
