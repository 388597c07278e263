"""`baton status`: the cluster as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deploy.client import ClientParser, get

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
    parser = ClientParser(
        "baton status", "Pools, peers, load and free blocks of a running cluster."
    )
    parser.add_argument("--json", action="store_true", help="print what GET /status answers")
    options = parser.parse_args(list(argv))
    status = get(options, "status", "workers")
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
    state = "ready"
    if not status["ready"]:
        state = "not ready: it is about to end, or has no decode worker and none of role both"
    if "gateway" in status:
        state += f" (as seen by {status['gateway']}, one of {len(status['gateways'])} gateways)"
    return "\n".join([f"model {status['model']}: {state}", *(line.rstrip() for line in lines)])
