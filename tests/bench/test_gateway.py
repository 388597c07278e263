"""`baton bench gateway`: what it counts, what it prints, and one small run of the real thing."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from bench import gateway
from bench.gateway import Measured, Options, parse, table
from bench.gateway_reader import Stream, read_all
from cluster.errors import StartError


def chunk(text: str) -> bytes:
    event = f'data: {{"choices":[{{"text":"{text}"}}]}}\n\n'.encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def test_a_token_is_counted_once_wherever_reads_cut_it() -> None:
    whole = b"HTTP/1.1 200 OK\r\n\r\n" + chunk(" w1") + chunk(" w23 w4") + chunk("")
    whole += b"0\r\n\r\n"
    for step in (1, 2, 3, 7, len(whole)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # Small enough to be there at once; the reader takes what `step` allows it.
            theirs.sendall(whole)
            stream = Stream(_Sips(ours, step))  # type: ignore[arg-type]
            reads = read_all([stream], stream)
        assert (stream.tokens, stream.events, stream.whole) == (3, 3, whole)
        covered = [index for _, first, behind in reads for index in range(first, behind)]
        assert covered == [0, 1, 2]


class _Sips:
    """A socket that gives at most so many bytes at a time."""

    def __init__(self, connection: socket.socket, size: int) -> None:
        self._connection = connection
        self._size = size

    def fileno(self) -> int:
        return self._connection.fileno()

    def recv(self, size: int) -> bytes:
        return self._connection.recv(min(size, self._size))


def measured(server: str, paced: bool, cpu_s: float) -> Measured:
    return Measured(server, paced, 1000, 1000, 2.0, cpu_s, 0.5, 1.25, 2.5)


def test_the_table_shows_medians_and_the_share_of_the_bare_application() -> None:
    rounds = [
        measured(server, paced, cpu)
        for paced in (True, False)
        for server, cpus in (("gateway", (0.04, 0.05, 0.9)), ("bare", (0.02, 0.02, 0.03)))
        for cpu in cpus
    ]
    lines = table(rounds).splitlines()
    assert "20000" in lines[1] and "1.25" in lines[1] and "50.0" in lines[1]
    assert lines[3].split() == ["gateway", "/", "bare", "0.40"]
    assert "25%" in lines[1]


@pytest.mark.parametrize(
    "flags", [["--streams", "0"], ["--steps", "0"], ["--pace", "0"], ["--rounds", "0"]]
)
def test_flags_that_make_no_sense(flags: list[str]) -> None:
    with pytest.raises(StartError, match=flags[0]):
        parse(flags)


def test_defaults_are_the_issues() -> None:
    assert parse([]) == Options() and Options().streams == 256


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core serves, another asks")
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gateway.json"
    few = ["--streams", "4", "--steps", "6", "--pace", "50", "--rounds", "1"]
    assert gateway.main([*few, "--output", str(output)]) == 0
    assert "gateway / bare" in capsys.readouterr().out
    saved = json.loads(output.read_text())
    assert [(one["server"], one["paced"]) for one in saved["rounds"]] == [
        ("gateway", True),
        ("bare", True),
        ("gateway", False),
        ("bare", False),
    ]
    ours, bare = saved["rounds"][:2]
    assert ours["tokens"] == bare["tokens"] == 4 * 6
    assert ours["events"] == bare["events"], "the same events go out on both"
    assert all(one["cpu_s"] > 0 and one["p50_ms"] > 0 for one in saved["rounds"])
