from __future__ import annotations

import pytest

from bench import sse
from bench.sse import SSEParser

STREAM = (
    b": a comment\r\n\r\n"
    b'data: {"text":"\xe2\x82\xac"}\r\n\r\n'
    b"event: note\nid: 7\ndata: one\ndata: two\n\n"
    b"data:bare\r\r"
    b"\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = ['{"text":"€"}'.encode(), b"one\ntwo", b"bare", b"[DONE]"]


def test_whole_stream_in_one_read() -> None:
    assert SSEParser().feed(STREAM) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_any_split_gives_the_same_events(size: int) -> None:
    parser = SSEParser()
    seen = []
    for start in range(0, len(STREAM), size):
        seen += parser.feed(STREAM[start : start + size])
    assert seen == EVENTS


def test_every_cut_in_two_gives_the_same_events() -> None:
    for at in range(len(STREAM)):
        parser = SSEParser()
        assert parser.feed(STREAM[:at]) + parser.feed(STREAM[at:]) == EVENTS, at


def test_event_comes_with_its_blank_line_and_not_before() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: x\n") == []
    assert parser.feed(b"\n") == [b"x"]
    assert parser.feed(b"data: never ended") == []


def test_crlf_between_reads_is_one_line_end() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"\ndata: b\r\n\r") == [b"a\nb"]
    assert parser.feed(b"") == []
    assert parser.feed(b"\ndata: c\n\n") == [b"c"]


def test_empty_and_absent_data() -> None:
    assert SSEParser().feed(b"data\n\ndata:\n\nid: 1\n\n") == [b"", b""]


def test_only_one_leading_space_belongs_to_the_framing() -> None:
    assert SSEParser().feed(b"data:  two\n\n") == [b" two"]


def test_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 10)
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        SSEParser().feed(b"data: 0123456789")
