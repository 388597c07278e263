"""Setting: where a part runs, how large its inputs are, and what the machine was found to reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch

Row = dict[str, Any]
"""One finding: `what`, numbers, and for a check `error`, `bound` and `ok`."""

Rows = Iterator[Row]

HALVES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""fp32 is for the interpreter, which computes in no half precision that could be trusted."""


@dataclass(frozen=True)
class Sizes:
    """Real ones by default; SMALL ones run under the interpreter."""

    heads: int = 32
    kv_heads: int = 8
    hidden: int = 4096
    inner: int = 14336
    vocab: int = 128256
    rows: tuple[int, ...] = (1, 64, 8192)
    prompts: tuple[int, ...] = (2048, 8192, 32768)
    batches: tuple[int, ...] = (1, 8, 64, 256)
    contexts: tuple[int, ...] = (1024, 4096, 32768)
    far: int = (1 << 31) + (1 << 27)  # elements of pages: offsets that 32 bits do not hold
    square: int = 8192
    copied: int = 4 << 30  # bytes
    draws: int = 64
    repeats: int = 20
    answers: int = 24
    requests: int = 64
    chunk: int = 8192
    steps: int = 40


SMALL: Final = Sizes(
    heads=4,
    kv_heads=2,
    hidden=64,
    inner=96,
    vocab=384,
    rows=(1, 5),
    prompts=(24,),
    batches=(1, 3),
    contexts=(40,),
    far=1 << 15,
    square=128,
    copied=1 << 20,
    draws=8,
    repeats=2,
    answers=2,
    requests=3,
    chunk=24,
    steps=3,
)


@dataclass(frozen=True)
class Limits:
    """What the device reaches, in bytes (read and written) and operations a second.

    Until it was measured: an H200 of the kind that NUMBERS tells of.
    """

    copy: float = 4.3e12
    products: float = 790e12


@dataclass(frozen=True)
class Setting:
    device: str = "cuda"
    seed: int = 0
    sizes: Sizes = field(default_factory=Sizes)
    limits: Limits = field(default_factory=Limits)

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.place.type == "cuda"

    def random(self, number: int = 0) -> torch.Generator:
        """On the device; another stream of numbers for each `number`."""
        return torch.Generator(self.place).manual_seed(self.seed * 1000 + number)


def checked(what: str, error: float, bound: float, **more: Any) -> Row:
    """A NaN is beyond any bound."""
    return {"what": what, "error": error, "bound": bound, "ok": error <= bound, **more}


def timed(
    what: str,
    seconds: float,
    limit: float,
    *,
    aim: float | None = None,
    peers: dict[str, float] | None = None,
    **more: Any,
) -> Row:
    """`limit`: the seconds it cannot go below. `aim`: the share of the limit, or of the best peer
    where there are any, that is to be reached."""
    row: Row = {"what": what, "us": seconds * 1e6, "limit_us": limit * 1e6}
    row["of_limit"] = limit / seconds
    reached = row["of_limit"]
    if peers:
        row["peers_us"] = {name: each * 1e6 for name, each in peers.items()}
        reached = row["of_best_peer"] = min(peers.values()) / seconds
    if aim is not None:
        row |= {"aim": aim, "reached": reached >= aim}
    return row | more
