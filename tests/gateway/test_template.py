"""Chat templates that compute for ever, and the process that bears it in the gateway's place."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from threading import Thread

import pytest

from cluster.errors import BadRequest
from gateway import sandbox, template
from gateway.template import ChatTemplate

USER = [{"role": "user", "content": "Hi"}]
GOOD = "{% for message in messages %}{{ message.content }}{% endfor %}"


def render(source: str) -> str:
    chat = ChatTemplate(source, {}, end_mark="E")
    return chat.render(USER, add_generation_prompt=True, continue_final_message=False)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else's children."""
    monkeypatch.setattr(template, "_idle", [])


@pytest.fixture
def hasty(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none that may take long."""
    monkeypatch.setattr(template, "PATIENCE_S", 1.5)


FOREVER = pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",  # one operation, which a compiler would like to do beforehand
    ],
)


@FOREVER
def test_a_template_without_an_end_is_killed_and_the_next_call_is_well(
    source: str, hasty: None
) -> None:
    for _ in range(2):
        with pytest.raises(BadRequest, match="too much time") as raised:
            render(source)
        assert raised.value.code == "invalid_messages"
    assert render(GOOD) == "Hi"


def test_it_ends_by_itself_when_nobody_waits_for_it(alone: None) -> None:
    """The kernel counts its time: it needs no gateway to end, nor a moment of its own."""
    with pytest.raises(BadRequest, match="too much time"):
        render("{{ 10 ** (10 ** 9) }}")
    assert sandbox.CPU_S < template.PATIENCE_S


def test_others_are_answered_meanwhile(hasty: None) -> None:
    def bad() -> None:
        with pytest.raises(BadRequest):
            render("{{ 10 ** (10 ** 9) }}")

    thread, answered = Thread(target=bad), 0
    thread.start()
    while thread.is_alive():
        assert render(GOOD) == "Hi"
        answered += 1
    assert answered > 1, "they waited for its end"


@pytest.mark.parametrize(
    "source", ["{{ 'x' * 10 ** 10 }}", "{{ 'x' | center(10 ** 10) }}", "{{ [0] * 10 ** 10 }}"]
)
def test_memory_is_bounded(source: str) -> None:
    with pytest.raises(BadRequest):
        render(source)
    assert render(GOOD) == "Hi"


def test_a_child_that_died_in_its_sleep_is_replaced(alone: None) -> None:
    assert render(GOOD) == "Hi"
    [child] = template._idle
    child._process.kill()
    child._process.wait()
    assert render(GOOD) == "Hi"
    assert template._idle[0] is not child


def test_no_child_outlives_its_parent(alone: None) -> None:
    """It ends with its stdin, which is how it learns that nobody is there any more."""
    assert render(GOOD) == "Hi"
    [child] = template._idle
    process = child._process
    child._lines.close()
    deadline = time.monotonic() + 30
    while process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.returncode == 0


ASKED = json.dumps({"source": "{{ x }}", "variables": {"x": "x"}, "max_chars": 9}).encode() + b"\n"


@pytest.mark.parametrize("said", [b"", ASKED[:-9], ASKED, ASKED * 3])
@pytest.mark.parametrize("read", [False, True])
def test_a_child_whose_gateway_was_killed_ends_without_a_word(said: bytes, read: bool) -> None:
    """Killed it says no goodbye: a question may be cut, an answer never read."""
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            child = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-I", sandbox.__file__],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE,
                )
            )
        ours.sendall(said)
        if read and said.endswith(b"\n"):
            assert ours.recv(1)  # a rest is left: what was not read resets the other end
        ours.close()
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, b"")
