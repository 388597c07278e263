"""`baton status`: the cluster as a table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp

from cluster.errors import StartError
from deploy.client import Parser, session, unreachable

COLUMNS = (
    ("name", "name"),
    ("role", "role"),
    ("incarnation", "incarnation"),
    ("state", "state"),
    ("running", "running"),
    ("waiting", "waiting"),
    ("queued", "queued_tokens"),
    ("free", "free_blocks"),
    ("cached", "cached_blocks"),
    ("promised", "promised_blocks"),
    ("owned", "owned_blocks"),
    ("blocks", "blocks"),
    ("size", "block_size"),
)


def main(argv: Sequence[str]) -> int:
    """Exit status 0 if the cluster can answer requests, 1 if not. Raises StartError."""
    parser = Parser("baton status", "Pools, peers, load and free blocks of a running cluster.")
    parser.add_argument("--json", action="store_true", help="print what GET /status answers")
    options = parser.parse_args(list(argv))

    async def ask() -> dict[str, Any]:
        async with session(options) as client, client.get("status") as response:
            if response.status != 200:
                raise StartError(f"{options.url}/status answers {response.status}")
            return dict(await response.json())

    try:
        status = asyncio.run(ask())
    except (aiohttp.ClientError, TimeoutError) as error:
        raise unreachable(options, error) from None
    print(json.dumps(status, indent=2) if options.json else table(status))
    return 0 if status["ready"] else 1


def table(status: dict[str, Any]) -> str:
    """One line per worker, columns as wide as they need to be."""
    rows = [[title for title, _ in COLUMNS]]
    for worker in status["workers"]:
        shown = worker | {"state": "draining" if worker["draining"] else "up"}
        rows.append([str(shown[key]) for _, key in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    state = (
        "ready" if status["ready"] else "not ready: needs a prefill and a decode worker, or a both"
    )
    return "\n".join([f"model {status['model']}: {state}", *(line.rstrip() for line in lines)])
