"""The process in which chat templates run: one JSON line in, one out, on stdin and stdout.

A template is a program that comes with a model. Jinja's sandbox keeps it from reaching anything,
but not from computing for ever or from filling the memory, and one operation (10 ** 10 ** 9) can
keep a whole interpreter busy. So it has a process of its own, with limits that the kernel keeps:
`python -I sandbox.py`. It knows the names that templates on the Hub expect, with the meaning that
transformers gives them. It ends when its stdin does.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 2.0
"""For one conversation. The largest that a body can hold takes about a tenth of it."""

MEMORY_BYTES = 1 << 30
"""Of address space; the largest conversation in the widest characters needs half of it."""


class Refused(jinja2.TemplateError):
    """The template called `raise_exception`."""


class Generation(Extension):
    """{% generation %} marks what a model is trained on; for serving it is only its contents."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as a plain attribute

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """Answer each line of {"source", "variables", "max_chars"} with {"text"} or {"error"}.

    A conversation that takes longer than CPU_S ends the process.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in asked:
        if not line.endswith(b"\n"):
            return  # who was asking is gone
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        answer = json.dumps(render(**json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer.encode() + b"\n")
        answers.flush()


def render(source: str, variables: Mapping[str, Any], max_chars: int) -> dict[str, str]:
    """{"text": ...}, or {"error": "refused" with "reason", "failed" or "too_long"}."""
    parts, size = [], 0
    try:
        for part in compiled(source).generate(variables):
            size += len(part)
            if size > max_chars:
                return {"error": "too_long"}
            parts.append(part)
    except Refused as refused:
        return {"error": "refused", "reason": str(refused)}
    except Exception:  # the template is the model's program: it can raise anything
        return {"error": "failed"}
    return {"text": "".join(parts)}


@functools.lru_cache(maxsize=4)
def compiled(source: str) -> jinja2.Template:
    """Compiling computes what is constant in a template: only here, never in the gateway."""
    return environment().from_string(source)


def environment() -> ImmutableSandboxedEnvironment:
    """The language that templates are written in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
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
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


if __name__ == "__main__":
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except OSError:  # who asked is gone, and nobody takes what a usual exit would flush
        os._exit(0)
