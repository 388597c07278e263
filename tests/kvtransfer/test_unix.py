from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.messages import Peer
from kvtransfer import unix
from kvtransfer.unix import Port, name_of, new_socket, owner, stopped
from tests.kvtransfer.fakes import Shown


def pair() -> tuple[socket.socket, socket.socket]:
    made = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in made:
        one.setblocking(False)
    return made


class Heard:
    def __init__(self, connected: socket.socket) -> None:
        self.messages: list[bytes] = []
        self.ends: list[str] = []
        self.port = Port(connected, self.messages.append, self.ends.append)


async def test_messages_stay_whole_and_in_order_however_many_wait() -> None:
    near, far = pair()
    port = Port(near, lambda message: None, lambda reason: None)
    sent = [b"%d" % number * 50 for number in range(3000)]
    for message in sent:  # more than a socket holds
        port.send(message)
    heard = Heard(far)
    while len(heard.messages) < len(sent):
        await asyncio.sleep(0)
    assert heard.messages == sent
    port.close()
    heard.port.close()


async def test_a_peer_that_goes_is_told_of_once() -> None:
    near, far = pair()
    heard = Heard(near)
    far.close()
    while not heard.ends:
        await asyncio.sleep(0)
    heard.port.send(b"x")
    heard.port.close()
    assert heard.ends == ["connection lost"]


async def test_a_peer_that_goes_while_something_is_sent_is_told_of_later() -> None:
    near, far = pair()
    heard = Heard(near)
    far.close()
    heard.port.send(b"x")
    assert heard.ends == []
    while not heard.ends:
        await asyncio.sleep(0)
    assert heard.ends[0].startswith("connection lost")


async def test_a_peer_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix, "MAX_QUEUED", 10)
    near, far = pair()
    heard = Heard(near)
    for _ in range(100_000):
        heard.port.send(b"x")
        if heard.ends:
            break
    assert heard.ends == ["the peer does not read"]
    far.close()


async def test_closing_may_be_repeated_and_ends_all() -> None:
    near, far = pair()
    heard = Heard(near)
    heard.port.close()
    heard.port.close()
    heard.port.send(b"x")
    assert far.recv(1) == b""
    assert heard.ends == []
    far.close()


def test_the_kernel_says_whose_process_it_is() -> None:
    near, far = pair()
    assert owner(near) == os.getpid()
    near.close()
    far.close()


@pytest.mark.parametrize(("user", "own", "let_in"), [(7, 7, True), (0, 7, True), (7, 0, False)])
def test_only_our_own_user_and_root_are_let_in(
    monkeypatch: pytest.MonkeyPatch, user: int, own: int, let_in: bool
) -> None:
    near, far = pair()
    monkeypatch.setattr("os.geteuid", lambda: own)
    monkeypatch.setattr(unix, "_CREDENTIALS", Shown(user))
    if let_in:
        assert owner(near) == 99
    else:
        with pytest.raises(PermissionError, match=f"its user is {user}, not {own}"):
            owner(near)
    near.close()
    far.close()


def test_a_name_is_no_path_and_of_one_start_only() -> None:
    first, second = name_of("kv", Peer("d", 1)), name_of("kv", Peer("d", 2))
    assert first != second
    assert first[0] == "\0"
    with new_socket() as listener:
        listener.bind(first)
        assert not list(Path.cwd().glob("*baton*sock*"))


def test_elsewhere_than_on_linux_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="Linux"):
        new_socket()


def test_a_stopped_process_is_noticed_and_others_are_not() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert not stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert stopped(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert not stopped(process.pid)
    assert not stopped(0)
