"""ChatTemplate: a model's Jinja template, which writes a conversation as one text.

The template runs in a process apart (gateway.sandbox), which is killed when it takes too long: what
comes with a model can neither hold up the gateway nor eat its memory. The way there and back takes
some 40 microseconds.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BufferedRWPair
from typing import Any

import jinja2

from cluster.errors import BadRequest
from gateway import sandbox

MAX_RENDERED_CHARS = 16 << 20
"""Four times what a body can hold: a template that writes more has lost itself in a loop."""

MAX_REASON_CHARS = 160

PATIENCE_S = 10.0
"""For a child that computes for two seconds at most, on a machine however busy."""


class ChatTemplate:
    """A model's template with its tokenizer's special tokens. Safe to share between threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], end_mark: str) -> None:
        """`end_mark` stands at the end of a message to be continued; no client may know it.

        Raises ValueError if `source` is no template.
        """
        try:
            sandbox.environment().parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._end_mark = end_mark

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        """The conversation as the model expects it. Raises BadRequest with invalid_messages."""
        seen = [dict(message) for message in messages]
        if continue_final_message:
            # The space tells whether this template trims what it is given.
            seen[-1]["content"] += self._end_mark + " "
        text = self._render(seen, add_generation_prompt)
        if not continue_final_message:
            return text
        before, mark, after = text.rpartition(self._end_mark)
        if not mark:
            raise _bad_messages("The chat template leaves out the message to be continued.")
        return before if after.startswith(" ") else before.rstrip()

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        asked = {"source": self._source, "variables": variables, "max_chars": MAX_RENDERED_CHARS}
        match _ask_a_child(json.dumps(asked).encode() + b"\n"):
            case {"text": str(text)}:
                return text
            case {"error": "too_long"}:
                raise _bad_messages("The chat template makes these messages too long.")
            case {"error": "refused", "reason": str(reason)}:
                reason = reason[:MAX_REASON_CHARS]
                raise _bad_messages(f"The chat template refuses these messages: {reason}")
            case {"error": "failed"}:
                raise _bad_messages("The chat template failed on these messages.")
        raise _bad_messages("The chat template took too much time or memory.")


class _Child:
    """One sandbox process. It ends with us: at the end of its stdin or of its time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", sandbox.__file__],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
        with ours:
            ours.settimeout(PATIENCE_S)
            self._lines = ours.makefile("rwb")
        self.end = weakref.finalize(self, _end, self._process, self._lines)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: bytes) -> Any:
        """Its answer. Raises OSError or ValueError if it gives none; it is of no use then."""
        self._lines.write(line)
        self._lines.flush()
        return json.loads(self._lines.readline())


def _end(process: subprocess.Popen[bytes], lines: BufferedRWPair) -> None:
    process.kill()
    process.wait()
    with suppress(OSError):  # what it was to read may still be in the buffer
        lines.close()


_idle: list[_Child] = []
"""Children that wait for work: as many as ever worked at once, which is one per text thread. They
know no template but the one in a question, so everybody in this process can share them."""


def _ask_a_child(line: bytes) -> Any:
    """A child's answer; None if it died over it or did not answer in time."""
    child = _idle.pop() if _idle else _Child()
    if not child.lives:
        child = _Child()
    try:
        answer = child.ask(line)
    except (OSError, ValueError):
        child.end()
        return None
    _idle.append(child)
    return answer


def _bad_messages(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_messages", param="messages")
