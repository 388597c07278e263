"""Real sockets on one port: which of them the kernel gives a connection to."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gateway.share import step_back, step_forward

COUNT = 3


@pytest.fixture
def listeners() -> Iterator[list[socket.socket]]:
    with ExitStack() as held:
        first = held.enter_context(socket.create_server(("127.0.0.1", 0), reuse_port=True))
        address = first.getsockname()
        others = [
            held.enter_context(socket.create_server(address, reuse_port=True))
            for _ in range(COUNT - 1)
        ]
        for listener in (first, *others):
            listener.setblocking(False)
        yield [first, *others]


def dealt(listeners: list[socket.socket], connections: int = 200) -> list[int]:
    """How many of so many connections each gets."""
    counts = [0] * len(listeners)
    for _ in range(connections):
        with socket.create_connection(listeners[0].getsockname()[:2], timeout=10):
            for number, listener in enumerate(listeners):
                try:
                    listener.accept()[0].close()
                except BlockingIOError:
                    continue
                counts[number] += 1
    assert sum(counts) == connections, "one waits where nobody looks"
    return counts


@pytest.mark.parametrize("own", range(COUNT))
def test_who_steps_back_gets_no_more_and_the_others_all(
    listeners: list[socket.socket], own: int
) -> None:
    assert all(dealt(listeners))
    step_back(listeners[own], own, COUNT)
    counts = dealt(listeners)
    assert counts.pop(own) == 0
    assert all(counts)
    step_forward(listeners[own])
    assert all(dealt(listeners))


def test_what_was_dealt_before_is_not_lost(listeners: list[socket.socket]) -> None:
    """Whoever is in the queue already stays there and is answered."""
    with ExitStack() as held:
        waiting = [
            held.enter_context(socket.create_connection(listeners[0].getsockname()[:2], timeout=10))
            for _ in range(60)
        ]
        step_back(listeners[1], 1, COUNT)
        for listener in listeners:
            while True:
                try:
                    accepted = held.enter_context(listener.accept()[0])
                except BlockingIOError:
                    break
                accepted.sendall(b"!")
        assert [client.recv(1) for client in waiting] == [b"!"] * 60


def test_the_last_to_step_back_counts(listeners: list[socket.socket]) -> None:
    step_back(listeners[0], 0, COUNT)
    step_back(listeners[1], 1, COUNT)
    counts = dealt(listeners)
    assert counts[0] and not counts[1] and counts[2]


def test_stepping_forward_without_having_stepped_back(listeners: list[socket.socket]) -> None:
    step_forward(listeners[0])
    step_back(listeners[0], 0, COUNT)
    for _ in range(2):
        step_forward(listeners[0])
    assert all(dealt(listeners))
