"""Bytes to JSON, so strictly that no two readers could understand a body differently."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from gateway.fields import refusal, shown

SMALL_BODY = 64 << 10
"""Bytes that are parsed and validated within a few milliseconds, whatever they hold. More is a
thread's work."""

_SURROGATE = re.compile(rb"\\u[dD][89abABcdefCDEF]")


def parse_json(body: bytes) -> Any:
    """One JSON document in UTF-8 and nothing after it.

    Raises BadRequest: invalid_json, or duplicate_parameter for a key that comes twice.
    """
    try:
        data = json.loads(
            body.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer if len(body) > SMALL_BODY else None,
        )
        if _SURROGATE.search(body):
            # Escapes can spell half a character pair, which is no text; encoding finds it.
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        # Cut or trailing text, wrong encoding, NaN, numbers beyond any range, depth without end.
        raise refusal("invalid_json", "The body is not valid JSON in UTF-8.") from None
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                name = shown(name)
                raise refusal("duplicate_parameter", f"'{name}' is given more than once.", name)
            seen.add(name)
    return data


def _integer(text: str) -> int:
    """What json does by itself. But a call into Python is where a thread gives way to others, and
    a body can hold two million of these."""
    return int(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(text)
    return value
