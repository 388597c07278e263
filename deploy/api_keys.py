"""`baton keys api`: a fresh API key on stderr, its entry for the key file on stdout.

    baton keys api --tenant search --requests-per-minute 600 >> keys.yaml

The key is shown this once and kept nowhere; the entry holds its digest.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from collections.abc import Sequence

from deploy.parser import Parser
from gateway.keys import Entry, checked

KEY_BYTES = 32


def main(argv: Sequence[str]) -> int:
    """Raises StartError for what no entry may say."""
    options = vars(_parser().parse_args(list(argv)))
    key = "baton-" + secrets.token_urlsafe(KEY_BYTES)
    stated = {name: value for name, value in options.items() if value is not None}
    entry = {"key_sha256": hashlib.sha256(key.encode()).hexdigest(), **stated}
    checked(entry)
    # JSON is YAML, and quotes what only looks like a number.
    lines = [f"{name}: {json.dumps(value)}" for name, value in entry.items()]
    print("- " + "\n  ".join(lines), flush=True)
    print(f"The key, shown this once: {key}", file=sys.stderr)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "baton keys api",
        "Make an API key: the key itself on stderr, its entry for --api-key-file on stdout.",
    )
    parser.add_argument("--tenant", default="default", help="keys of one share limits and cache")
    parser.add_argument("--models", nargs="+", help="names that it may use (default: all)")
    for name, kind in (
        ("requests-per-minute", int),
        ("tokens-per-minute", int),
        ("weight", float),
        ("priority", int),
    ):
        text = Entry.model_fields[name.replace("-", "_")].description
        parser.add_argument(f"--{name}", type=kind, help=text)
    return parser
