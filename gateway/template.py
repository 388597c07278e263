"""ChatTemplate: a model's Jinja template, which writes a conversation as one text.

The template comes with the model and runs in Jinja's sandbox. It sees the names that templates on
the Hub expect, with the meaning that transformers gives them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import BadRequest

MAX_RENDERED_CHARS = 16 << 20
"""Four times what a body can hold: a template that writes more has lost itself in a loop."""

MAX_REASON_CHARS = 160


class ChatTemplate:
    """A compiled template with its tokenizer's special tokens. Safe to share between threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], end_mark: str) -> None:
        """`end_mark` stands at the end of a message to be continued; no client may know it.

        Raises ValueError if `source` is no template.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None
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
        try:
            text = self._render(seen, add_generation_prompt)
        except BadRequest:
            raise
        except _Refused as refused:
            reason = str(refused)[:MAX_REASON_CHARS]
            raise _bad_messages(f"The chat template refuses these messages: {reason}") from None
        except Exception:  # the template is the model's program: it can raise anything
            raise _bad_messages("The chat template failed on these messages.") from None
        if not continue_final_message:
            return text
        before, mark, after = text.rpartition(self._end_mark)
        if not mark:
            raise _bad_messages("The chat template leaves out the message to be continued.")
        return before if after.startswith(" ") else before.rstrip()

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        parts, size = [], 0
        for part in self._template.generate(
            **self._special_tokens,
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        ):
            size += len(part)
            if size > MAX_RENDERED_CHARS:
                raise _bad_messages("The chat template makes these messages too long.")
            parts.append(part)
        return "".join(parts)


class _Refused(jinja2.TemplateError):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """{% generation %} marks what a model is trained on; for serving it is only its contents."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as a plain attribute

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _bad_messages(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_messages", param="messages")
