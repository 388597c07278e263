"""Digests: `digests.json` beside a checkpoint says what its files are, byte for byte.

safetensors does not notice a flipped bit in a tensor. Where the file is there, every process
compares before it uses what it reads: workers all files, gateways all but the weights.

    {"config.json": {"bytes": 512, "sha256": "..."}, ...}
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from cluster.errors import BadModel
from cluster.fields import read_object

log = logging.getLogger(__name__)

DIGESTS: Final = "digests.json"
WEIGHTS: Final = ".safetensors"
SUFFIXES: Final = (WEIGHTS, ".json", ".jinja")
"""Of files that a checkpoint may be read from. Another file changes nothing, so it may change."""


def write(directory: Path) -> dict[str, dict[str, Any]]:
    """Record the files as they are now. Returns what it wrote. Raises OSError."""
    names = _names(directory)
    found = dict(zip(names, _measured(directory, names), strict=True))
    text = json.dumps(found, indent=1) + "\n"
    (directory / DIGESTS).write_text(text, encoding="utf-8")
    return found


def verify(directory: Path, *, weights: bool = True, skip: bool = False) -> None:
    """Raises BadModel for the first file that is not what digests.json says, or that it does not
    know; nothing to do where there is no digests.json. `skip` says it in the log instead."""
    if not (directory / DIGESTS).is_file():
        return
    started = time.monotonic()
    try:
        size = _compare(directory, read_object(directory / DIGESTS), weights)
    except BadModel as error:
        if not skip:
            raise BadModel(f"{error.message}; --skip-digest loads it all the same") from None
        log.warning("loaded all the same", extra={"reason": error.message})
    except OSError as error:
        raise BadModel(f"{error.filename}: cannot be read: {error.strerror}") from None
    else:
        seconds = round(time.monotonic() - started, 3)
        log.debug("files are those of digests.json", extra={"bytes": size, "seconds": seconds})


def _compare(directory: Path, stated: dict[str, Any], weights: bool) -> int:
    """How many bytes were compared. Raises BadModel."""
    there, listed = (
        [name for name in names if weights or not name.endswith(WEIGHTS)]
        for names in (_names(directory), stated)
    )
    for name in there:
        if name not in listed:
            raise BadModel(f"{name}: {DIGESTS} does not know it: remove it or run `baton digest`")
    for name in listed:
        if name not in there:
            raise BadModel(f"{name}: missing, although {DIGESTS} lists it")
    found = _measured(directory, there)
    for name, measured in zip(there, found, strict=True):
        if measured != stated[name]:
            raise BadModel(f"{name}: is {_shown(measured)}, {DIGESTS} says {_shown(stated[name])}")
    return sum(measured["bytes"] for measured in found)


def _shown(entry: Any) -> str:
    if type(entry) is not dict or entry.keys() != {"bytes", "sha256"}:
        return f"{entry!r:.80}"
    return f"sha256 {entry['sha256']!s:.64} of {entry['bytes']!s:.20} bytes"


def _names(directory: Path) -> list[str]:
    return sorted(
        path.name
        for path in directory.iterdir()
        if path.suffix in SUFFIXES and path.name != DIGESTS and path.is_file()
    )


def _measured(directory: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Shards side by side: hashlib holds no lock while it works."""

    def measure(name: str) -> dict[str, Any]:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(measure, names))
