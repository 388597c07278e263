"""ChaosOptions: the command line of `baton chaos`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bench.chaos.house import Plan
from bench.options import require
from cluster.config import BUILT_IN

ROUNDS: Final = ("kill", "stop", "drain", "cancel", "busy", "gateway", "degrade")


@dataclass(frozen=True)
class Counts:
    """How much of each round. `asks` bounds the different answers; 0 takes all there are."""

    streams: int = 40
    short_stops: int = 3
    long_stops: int = 1
    drains: int = 1
    cancels: int = 300
    busy_seconds: int = 10
    gateways: int = 1
    asks: int = 12


FULL: Final = Counts(
    streams=1000,
    short_stops=20,
    long_stops=10,
    drains=10,
    cancels=10_000,
    busy_seconds=120,
    gateways=3,
    asks=0,
)


@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    """One run. Checked when made: raises StartError."""

    plan: Plan
    counts: Counts
    rounds: tuple[str, ...] = ROUNDS
    width: int = 8
    seed: int = 0
    output: Path | None = None
    transcript: Path | None = None

    def __post_init__(self) -> None:
        plan, counts = self.plan, self.counts
        require(plan.prefill >= 2 and plan.decode >= 2, "two workers of each role at least")
        require(self.width >= 1, "--width must be at least 1")
        for name in Counts.__dataclass_fields__:
            flag = f"--{name.replace('_', '-')}"
            require(getattr(counts, name) >= 0, f"{flag} must not be negative")

    @property
    def directory(self) -> Path:
        """Where the model is."""
        return Path(self.plan.model) if self.plan.model else BUILT_IN


def build_parser() -> argparse.ArgumentParser:
    plan, short = Plan(), Counts()
    parser = argparse.ArgumentParser(
        prog="baton chaos",
        description="Strikes a cluster of its own, and compares every answer with the undisturbed "
        "one. Exit status 1 if one differs, if one fails that need not, or if a block is left.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", nargs="?", default="", metavar="MODEL", help="directory (default: baton-tiny)")
    add("--full", action="store_true", help="about half an hour instead of a minute")
    add("--rounds", nargs="+", choices=ROUNDS, default=list(ROUNDS), help="default: all of them")
    for name, text in (
        ("streams", "answers under kill -9"),
        ("short_stops", "SIGSTOPs of 0.4 s"),
        ("long_stops", "SIGSTOPs of 3 to 5 s"),
        ("drains", "rolling restarts of all workers"),
        ("cancels", "clients that vanish"),
        ("busy_seconds", "how long every core is kept busy"),
        ("gateways", "kills of a gateway"),
        ("asks", "different answers, 0 for all there are"),
    ):
        shown = f"{text} (default: {getattr(short, name)}, with --full {getattr(FULL, name)})"
        add(f"--{name.replace('_', '-')}", type=int, metavar="N", help=shown)
    add("--prefill", type=int, default=plan.prefill, help=f"workers (default: {plan.prefill})")
    add("--decode", type=int, default=plan.decode, help=f"workers (default: {plan.decode})")
    add("--width", type=int, default=8, help="answers at a time (default: 8)")
    add("--seed", type=int, default=0, help="of prompts and blows (default: 0)")
    add("--kv-cache-memory-bytes", type=int, default=plan.kv_cache_memory_bytes, help="per worker")
    add("--output", type=Path, help="JSON file")
    add(
        "--transcript",
        type=Path,
        metavar="FILE",
        help="instead of the rounds: one answer that outlives three blows, as a timeline",
    )
    return parser


def parse_options(argv: Sequence[str]) -> ChaosOptions:
    """Raises StartError; SystemExit for --help and unknown flags."""
    given = build_parser().parse_args(list(argv))
    base = FULL if given.full else Counts()
    asked = {
        name: value
        for name in Counts.__dataclass_fields__
        if (value := getattr(given, name)) is not None
    }
    return ChaosOptions(
        plan=Plan(
            model=given.model,
            prefill=given.prefill,
            decode=given.decode,
            kv_cache_memory_bytes=given.kv_cache_memory_bytes,
        ),
        counts=replace(base, **asked),
        rounds=tuple(name for name in ROUNDS if name in given.rounds),
        width=given.width,
        seed=given.seed,
        output=given.output,
        transcript=given.transcript,
    )
