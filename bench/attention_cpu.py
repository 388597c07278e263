"""attention_cpu: the native attention kernels, beside torch's and beside what this CPU allows.

    python -m bench.attention_cpu --threads 2 --out bench/results/attention-cpu.json

decode   one query row for each sequence over paged keys and values. Limit: the bytes of keys and
         values over the memory read bandwidth of the same run. Every call reads other pages than
         the one before, half a gigabyte in turn, or they would come from the cache: between two
         calls for one layer a real step reads the weights of a model.
prefill  one prompt from its first token. Limit: 4 * tokens^2 / 2 * heads * head_dim operations over
         the fp32 rate of a 2048^3 matrix product by torch in the same run. On AMD that product is
         MKL's and short of what the CPU can do: more than 100 % of this limit is possible.

torch's scaled_dot_product_attention gets its best case: contiguous float32 keys and values of equal
length instead of pages; for decode the query heads of a KV head folded into rows, for prefill keys
and values repeated for every head beforehand. Rounds alternate between all of them; shown are
medians, in ms for all layers. Before each turn the threads of the one before get time to go to
sleep: torch's spin for a while after their last work, on a core that others want.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch.nn import functional

from engine import native
from engine.native import ops
from engine.native.attention import attend_prompts, attend_singles

BATCHES: Final = (1, 8, 32)
CONTEXTS: Final = (512, 2048, 8192)
PROMPTS: Final = (128, 512, 2048, 8192)
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_POOL_BYTES: Final = 512 << 20  # many times a last-level cache
_PASS_SECONDS: Final = 0.05  # of calls at least, for the clock and for what else the machine does
_SETTLE_SECONDS: Final = 0.1

Call = Callable[[int], object]
"""Runs the i-th call of a pass, on memory of its own."""


@dataclass(frozen=True, kw_only=True)
class Options:
    threads: int = 2
    heads: int = 14
    kv_heads: int = 2
    head_dim: int = 64
    layers: int = 24
    block_size: int = 16
    pages: str = "float32"
    rounds: int = 5
    out: str | None = None

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * DTYPES[self.pages].itemsize


@dataclass(frozen=True)
class Case:
    """What is called for one shape. `work` is bytes for decode and operations for prefill."""

    phase: str
    batch: int
    tokens: int
    work: float
    calls: int
    ours: Call
    peer: Call


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if not native.available():
        print(f"bench attention_cpu: {native.why_not()}", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    native.set_threads(options.threads)
    with torch.inference_mode():
        result = run(options)
    print(table(result))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def parse(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(prog="bench attention_cpu", description="Native attention.")
    for name in ("threads", "heads", "kv_heads", "head_dim", "layers", "block_size", "rounds"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(Options, name))
    parser.add_argument("--pages", choices=DTYPES, default=Options.pages)
    parser.add_argument("--out", help="write the result here as JSON")
    return Options(**vars(parser.parse_args(argv)))


def run(options: Options) -> dict[str, Any]:
    """Measure everything. Returns what is written as JSON."""
    pool = Pool(options)
    cases = [decode_case(options, pool, n, context) for n in BATCHES for context in CONTEXTS]
    cases += [prefill_case(options, pool, tokens) for tokens in PROMPTS]
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for name, once in (("read", pool.read), ("multiply", _multiply())):
            seconds.setdefault((name, 0), []).append(min(_time(once, 1) for _ in range(3)))
        for number, case in enumerate(cases):
            for name, call in (("ours", case.ours), ("peer", case.peer)):
                seconds.setdefault((name, number), []).append(_time(call, case.calls))
    read_rate = pool.bytes / median(seconds["read", 0])
    flop_rate = 2 * 2048**3 / median(seconds["multiply", 0])
    rows = []
    for number, case in enumerate(cases):
        ours, peer = (options.layers * median(seconds[name, number]) for name in ("ours", "peer"))
        rate = read_rate if case.phase == "decode" else flop_rate
        rows.append(
            {
                "phase": case.phase,
                "batch": case.batch,
                "tokens": case.tokens,
                "ms": ours * 1e3,
                "limit_ms": options.layers * case.work / rate * 1e3,
                "sdpa_ms": peer * 1e3,
                "rounds_ms": [options.layers * each * 1e3 for each in seconds["ours", number]],
            }
        )
    return {
        "options": asdict(options),
        "cpu": _cpu_name(),
        "isa": native.isa(),
        "torch": torch.__version__,
        "read_gb_s": read_rate / 1e9,
        "fp32_gflop_s": flop_rate / 1e9,
        "rows": rows,
    }


class Pool:
    """Pages that all decode cases share, far larger than the caches."""

    def __init__(self, options: Options) -> None:
        slots = _POOL_BYTES // options.token_bytes // options.block_size * options.block_size
        shape = (2, slots, options.kv_heads, options.head_dim)
        random = torch.Generator().manual_seed(0)
        self.pages = torch.randn(shape, generator=random).to(DTYPES[options.pages])
        self.keys, self.values = self.pages
        self.dense = self.pages.float()  # for torch, which wants one dtype
        self.slots = slots
        self.blocks = slots // options.block_size
        self.bytes = self.dense.nbytes
        self.random = random

    def read(self, _: int) -> object:
        """Read it all and do nearly nothing: greedy argmax is one pass of loads."""
        return ops.argmax(self.dense.view(1, -1))


def decode_case(options: Options, pool: Pool, batch: int, context: int) -> Case:
    width = context // options.block_size
    calls = pool.blocks // (batch * width)
    order = torch.randperm(pool.blocks, generator=pool.random)[: calls * batch * width]
    tables = order.view(calls, batch, width).int()
    contexts = torch.full((batch,), context, dtype=torch.int32)
    q = torch.randn((batch, options.heads, options.head_dim), generator=pool.random)
    shape = (2, calls, batch, options.kv_heads, context, options.head_dim)
    dense = pool.dense.flatten()[: torch.Size(shape).numel()].view(shape)
    folded = q.view(batch, options.kv_heads, -1, options.head_dim)
    args = (options.block_size, 0, options.scale)
    return Case(
        phase="decode",
        batch=batch,
        tokens=context,
        work=float(batch * context * options.token_bytes),
        calls=calls,
        ours=lambda i: attend_singles(q, pool.keys, pool.values, contexts, tables[i], *args),
        peer=lambda i: functional.scaled_dot_product_attention(folded, dense[0, i], dense[1, i]),
    )


def prefill_case(options: Options, pool: Pool, tokens: int) -> Case:
    table = torch.randperm(pool.blocks, generator=pool.random)[: tokens // options.block_size]
    table = table[None].int()
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    q = torch.randn((tokens, options.heads, options.head_dim), generator=pool.random)
    heads_first = q.transpose(0, 1)[None].contiguous()
    keys, values = torch.randn(2, *heads_first.shape, generator=pool.random)
    args = (options.block_size, 0, options.scale, tokens)
    work = 2.0 * tokens * tokens * options.heads * options.head_dim
    return Case(
        phase="prefill",
        batch=1,
        tokens=tokens,
        work=work,
        calls=max(1, int(_PASS_SECONDS * 200e9 / work)),
        ours=lambda _: attend_prompts(q, pool.keys, pool.values, starts, starts[1:], table, *args),
        peer=lambda _: functional.scaled_dot_product_attention(
            heads_first, keys, values, is_causal=True
        ),
    )


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['cpu']}, {result['isa']}, {result['options']['threads']} threads: memory read "
        f"{result['read_gb_s']:.1f} GB/s, fp32 product {result['fp32_gflop_s']:.0f} GFLOP/s; "
        f"ms for {result['options']['layers']} layers",
        f"{'':<8}{'batch':>6}{'tokens':>8}{'ms':>10}{'limit':>10}{'of limit':>10}{'SDPA':>10}"
        f"{'faster':>9}",
    ]
    lines += [
        f"{row['phase']:<8}{row['batch']:>6}{row['tokens']:>8}{row['ms']:>10.2f}"
        f"{row['limit_ms']:>10.2f}{row['limit_ms'] / row['ms']:>9.0%} {row['sdpa_ms']:>10.2f}"
        f"{row['sdpa_ms'] / row['ms']:>8.1f}x"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def _time(call: Call, calls: int) -> float:
    """Seconds for one of `calls` calls."""
    time.sleep(_SETTLE_SECONDS)
    call(0)
    start = time.perf_counter()
    for i in range(calls):
        call(i)
    return (time.perf_counter() - start) / calls


def _multiply() -> Call:
    a, b = torch.randn(2, 2048, 2048)
    return lambda _: a @ b


def _cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
