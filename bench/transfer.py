"""transfer: how fast KV goes from worker to worker, what checking costs, what a request waits for.

speed      GB/s of every transport beside raw sockets and memcpy, at several chunk sizes
checks     the same with the digest left out, and with the landing's checks left out as well
exposed    of the time to the second token, what a transfer that takes no time would save
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import uvloop

from bench import transfer_exposed, transfer_speed
from bench.compare import describe
from bench.compare_flags import CompareOptions
from bench.options import require
from bench.transfer_end import ALL, SHARED, Settings
from bench.transfer_exposed import Exposed
from bench.transfer_speed import Speed
from cluster.errors import StartError

PARTS: Final = ("speed", "exposed")


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """One measurement. Raises StartError for what cannot work."""

    parts: tuple[str, ...] = PARTS
    cores: tuple[int, ...] = ()
    rounds: int = 5
    tokens: int = 4096
    chunk_kib: tuple[int, ...] = (256, 1024, 2048, 8192)
    prompts: tuple[int, ...] = (128, 512, 2048, 8192)
    output: str = "bench/results/transfer.json"

    def __post_init__(self) -> None:
        require(len(set(self.cores)) == 2, "--cores needs two different cores")
        missing = set(self.cores) - os.sched_getaffinity(0)
        require(not missing, f"--cores: {sorted(missing)} not among those this process may use")
        require(self.rounds >= 1, "--rounds must be at least 1")
        require(self.tokens >= 1, "--tokens must be at least 1")
        require(
            all(1 <= size <= 16384 for size in self.chunk_kib), "--chunk-kib: from 1 to 16384 each"
        )
        longest = transfer_exposed.LONGEST - 2
        require(
            all(1 <= tokens <= longest for tokens in self.prompts),
            f"--prompts: from 1 to {longest} tokens each",
        )


def parse_options(argv: Sequence[str]) -> TransferOptions:
    """Raises StartError; SystemExit for --help and unknown flags."""
    parser = argparse.ArgumentParser(
        prog="baton bench transfer",
        description="KV from worker to worker: GB/s, the cost of checks, the time that is exposed.",
        allow_abbrev=False,
    )
    base = TransferOptions
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    add("--cores", type=int, nargs=2, metavar=("A", "B"), help="sender, receiver (the first two)")
    for name, text in (
        ("rounds", "of each number; the median counts"),
        ("tokens", "tokens of a handoff whose speed is measured, 24,576 bytes each"),
    ):
        value = getattr(base, name)
        add(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    for name, text in (("chunk_kib", "sizes of chunks"), ("prompts", "lengths of prompts")):
        values = getattr(base, name)
        shown = " ".join(map(str, values))
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, nargs="+", default=values, help=f"{text} (default: {shown})")
    add("--output", default=base.output, help="JSON file")
    given = vars(parser.parse_args(list(argv)))
    given["cores"] = tuple(given["cores"] or sorted(os.sched_getaffinity(0))[:2])
    for name in ("parts", "chunk_kib", "prompts"):
        given[name] = tuple(given[name])
    return TransferOptions(**given)


def main(argv: Sequence[str]) -> int:
    """Run `baton bench transfer`. Raises StartError."""
    options = parse_options(argv)
    found: dict[str, Any] = {
        "date": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "hardware": describe(CompareOptions(cores=options.cores)),
    }
    if "speed" in options.parts:
        speeds = uvloop.run(all_speeds(options))
        print(speed_table(speeds))
        found["speed"] = [speed.to_json() for speed in speeds]
    if "exposed" in options.parts:
        a, b = options.cores
        exposed = asyncio.run(transfer_exposed.measure(options.prompts, (a, b), options.rounds))
        print(exposed_table(exposed))
        found["exposed"] = [one.to_json() for one in exposed]
    save(Path(options.output), found)
    print(f"Saved to {options.output}")
    return 0


async def all_speeds(options: TransferOptions) -> list[Speed]:
    """Sender on one core, receiver on the other; memcpy on the sender's."""
    sender, receiver = options.cores
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sender})
    try:
        cache = transfer_speed.filled(options.tokens)
        chunks = tuple(size << 10 for size in options.chunk_kib)
        base = Settings(SHARED, options.tokens, chunks, core=receiver)
        found: list[Speed] = []
        for settings in transfer_speed.plan(base):
            found += await transfer_speed.measure(settings, cache, options.rounds)
            print(f"{settings.transport}: {found[-1].median:.2f} GB/s", file=sys.stderr)
    finally:
        os.sched_setaffinity(0, before)
    return found


def save(path: Path, found: dict[str, Any]) -> None:
    """Parts that were not measured now stay as they were. Raises StartError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for part in PARTS:
            if part in found:
                known[part] = {key: found[key] for key in ("date", "hardware")}
                known[part]["measured"] = found[part]
        path.write_text(json.dumps(known, separators=(",", ":")) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise StartError(f"--output {path}: {error}") from None


def speed_table(speeds: Sequence[Speed]) -> str:
    """Ways as rows, chunk sizes as columns; below it, what the checks take."""
    whole = [speed for speed in speeds if speed.checks == ALL or not speed.checks]
    chunks = sorted({speed.chunk_bytes for speed in whole})
    cell = {(speed.transport, speed.chunk_bytes): f"{speed.median:.2f}" for speed in whole}
    lines = [f"{'GB/s, chunks of':<24}" + "".join(f"{c / 2**20:>8g} MiB" for c in chunks)]
    lines += [
        f"{way:<24}" + "".join(f"{cell.get((way, c), '-'):>12}" for c in chunks)
        for way in dict.fromkeys(speed.transport for speed in whole)
    ]
    for checks in (one for one in speeds if one.checks not in ("", ALL)):
        same = [one for one in speeds if (one.transport, one.checks) == (checks.transport, ALL)]
        everything = next(o.median for o in reversed(same) if o.chunk_bytes == checks.chunk_bytes)
        lines.append(
            f"{checks.transport}, {checks.checks}: {checks.median:.2f} GB/s, so that takes "
            f"{100 * (1 - everything / checks.median):.1f} % of it"
        )
    return "\n".join(lines)


def exposed_table(found: Sequence[Exposed]) -> str:
    lines = [
        f"{'prompt tokens':<16}{'prefill ms':>12}{'slowed ms':>12}{'tail ms':>10}{'exposed':>10}"
    ]
    for one in found:
        numbers = one.to_json()
        alone = sorted(one.prefill_alone)[len(one.prefill_alone) // 2]
        lines.append(
            f"{one.tokens:<16}{alone:>12.2f}{numbers['slowed_ms']:>12.2f}{numbers['tail_ms']:>10.2f}"
            f"{100 * one.share:>9.2f}%"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
