"""Log lines: one JSON document each, whatever goes into them, with the id of their request."""

from __future__ import annotations

import asyncio
import json
import logging
from io import StringIO

import pytest

from cluster.process import REQUEST, JsonLines


@pytest.fixture
def lines() -> tuple[logging.Logger, StringIO]:
    out = StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines())
    log = logging.Logger("test")
    log.addHandler(handler)
    return log, out


def test_nothing_forges_a_line(lines: tuple[logging.Logger, StringIO]) -> None:
    log, out = lines
    forged = 'x\n{"level": "critical"}\r\x1b[2J\u2028"'
    log.warning("event", extra={"model": forged, forged: 1, "object": object})
    log.warning("%s", forged)
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["level"], first["model"], first[forged]) == ("warning", forged, 1)
    assert second["event"] == forged
    assert out.getvalue().isascii()


async def test_each_line_has_the_id_of_its_request(lines: tuple[logging.Logger, StringIO]) -> None:
    log, out = lines

    async def work(request: str) -> None:
        REQUEST.set(request)
        await asyncio.sleep(0)
        log.info("deep inside", extra={"mine": request})

    log.info("nobody's")
    await asyncio.gather(*(asyncio.create_task(work(name)) for name in ("a", "b")))
    first, *others = map(json.loads, out.getvalue().splitlines())
    assert "request_id" not in first
    assert [(line["request_id"], line["mine"]) for line in others] == [("a", "a"), ("b", "b")]
