"""GpuOptions: the command line of `python -m bench.gpu`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.options import require

SECTIONS: Final = ("machine", "check", "speed", "model", "cluster", "tune")


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """One run. Names in `only` and `skip` are parts or what they begin with: check, speed.decode.

    Raises StartError for what cannot work.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    tune: bool = False
    minutes: float = 8.0
    jobs: int = 12
    seed: int = 0
    device: str = "cuda"
    small: bool = False
    out: str = "bench/results/gpu.json"

    def __post_init__(self) -> None:
        require(self.minutes > 0, "--minutes must be greater than 0")
        require(self.jobs >= 1, "--jobs must be at least 1")
        for name in (*self.only, *self.skip):
            known = name.partition(".")[0] in SECTIONS
            require(known, f"{name!r} begins with none of {', '.join(SECTIONS)}; see --list")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Kernels, models and the cluster on one GPU, checked and timed.",
        allow_abbrev=False,
    )
    default = GpuOptions
    add = parser.add_argument
    add("--only", nargs="+", metavar="PART", help="these and what begins so: check speed.decode")
    add("--skip", nargs="+", metavar="PART", help="all but these")
    add("--tune", action="store_true", help="other configurations of the attention kernels too")
    add("--list", action="store_true", help="name the parts and end")
    minutes = f"begin nothing after these (default: {default.minutes:g})"
    add("--minutes", type=float, metavar="M", help=minutes)
    add("--jobs", type=int, metavar="N", help=f"checks at once (default: {default.jobs})")
    add("--seed", type=int, metavar="N", help="of inputs (default: another one each time)")
    add("--device", help=f"default: {default.device}")
    add("--small", action="store_true", help="tiny inputs: to try it, under Triton's interpreter")
    add("--out", metavar="FILE", help=f"JSON (default: {default.out})")
    return parser


def parse_options(argv: Sequence[str]) -> tuple[GpuOptions, bool]:
    """And whether the parts are only to be named. Raises StartError; SystemExit for --help."""
    flags = vars(build_parser().parse_args(list(argv)))
    listed = flags.pop("list")
    given = {name: value for name, value in flags.items() if value is not None}
    for name in ("only", "skip"):
        if name in given:
            given[name] = tuple(given[name])
    given.setdefault("seed", int.from_bytes(os.urandom(3), "little"))
    return GpuOptions(**given), listed
