"""linear: the linear layers of a 0.5B model on the CPU, beside torch and the machine's limits.

    python -m bench.linear [--threads 2] [--storage float32 bfloat16 int8] [--out F]

One number is the time of every matrix of 24 layers once (q,k,v 896 -> 1152, o 896 -> 896, gate,up
896 -> 9728, down 4864 -> 896) and, up to 128 rows, of the head 896 -> 151936; prompts need it for
one row only. All matrices are separate memory: one of them would stay in the last cache and lie.
From 512 rows on 4 layers are timed and counted six times. Best of the rounds, ours and torch's
taken in turn, because the noise of a shared machine only ever adds.

Limit: the larger of bytes / memory read rate and operations / the best GEMM rate of this run.
Torch: F.linear in float32; F.linear with bfloat16 activations too (ours stay float32); int8 by
oneDNN's quantised linear, packed, with a scale per output and one for all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine import native
from engine.native.linear import PackedLinear, Storage, quantise_rows

SHAPES = ((896, 1152), (896, 896), (896, 9728), (4864, 896))  # inputs, outputs
HEAD = (896, 151936)
LAYERS, FEW_LAYERS = 24, 4
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "int8")

Matmul = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine did in this run, at best."""

    read_bytes: float  # per second, of memory
    float_ops: float  # per second
    int8_ops: float

    def seconds(self, storage: str, weights: int, rows: int) -> float:
        rate = self.int8_ops if storage == "int8" else self.float_ops
        return max(weights * BYTES[storage] / self.read_bytes, 2 * rows * weights / rate)


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table; milliseconds."""

    storage: str
    rows: int
    ours_ms: float
    torch_ms: float
    limit_ms: float


def main(argv: list[str]) -> int:
    options = parse_options(argv)
    if not native.available():
        print(native.why_not(), file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    native.set_threads(options.threads)
    limits = measure_limits()
    print(
        f"{native.isa()}, {options.threads} threads: read {limits.read_bytes / 1e9:.1f} GB/s, "
        f"GEMM float32 {limits.float_ops / 1e9:.0f} GFLOP/s, int8 {limits.int8_ops / 1e9:.0f} GOP/s"
    )
    print(f"{'storage':10}{'rows':>6}{'ours ms':>10}{'torch ms':>10}{'limit ms':>10}{'/limit':>8}")
    lines: list[Line] = []
    for storage in options.storage:
        for line in measure_storage(storage, options.rows, options.rounds, limits):
            print(
                f"{line.storage:10}{line.rows:6}{line.ours_ms:10.1f}{line.torch_ms:10.1f}"
                f"{line.limit_ms:10.1f}{line.ours_ms / line.limit_ms:8.2f}",
                flush=True,
            )
            lines.append(line)
    if options.out is not None:
        save(options.out, options.threads, limits, lines)
    return 0


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=STORAGES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def save(out: Path, threads: int, limits: Limits, lines: Sequence[Line]) -> None:
    data = {
        "cpu": platform.processor() or platform.machine(),
        "isa": native.isa(),
        "threads": threads,
        "torch": torch.__version__,
        "limits": asdict(limits),
        "lines": [asdict(line) for line in lines],
    }
    out.write_text(json.dumps(data, indent=1) + "\n")


def measure_limits() -> Limits:
    """Read 1 GiB; multiply 2048^3, by torch and by ourselves, for whichever is the better limit."""
    block = torch.ones(1 << 28)
    read = block.nbytes / best(block.sum, 5)
    del block
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    ours = {storage: make_ours(b, storage) for storage in ("float32", "int8")}
    small, other = a.to(torch.int8), b.to(torch.int8).t()
    operations = 2 * size**3
    floats = min(best(lambda: a @ b, 3), best(lambda: ours["float32"](a), 3))
    ints = min(best(lambda: torch._int_mm(small, other), 3), best(lambda: ours["int8"](a), 3))
    return Limits(read, operations / floats, operations / ints)


def measure_storage(
    storage: Storage, rows: Sequence[int], rounds: int, limits: Limits
) -> list[Line]:
    """All matrices packed and as torch wants them, then each number of rows."""
    ours: list[tuple[int, Matmul]] = []
    theirs: list[tuple[int, Matmul]] = []
    shapes = [*SHAPES * LAYERS, HEAD]
    for inputs, outputs in shapes:
        weight = torch.empty(outputs, inputs).uniform_(-0.05, 0.05)
        ours.append((inputs, make_ours(weight, storage)))
        theirs.append((inputs, make_theirs(weight, storage)))
    lines = []
    for count in rows:
        few = count >= 512
        head = count <= 128
        timed = len(SHAPES) * (FEW_LAYERS if few else LAYERS) + head
        scale = LAYERS / FEW_LAYERS if few else 1.0
        weights = sum(i * o for i, o in shapes[: len(SHAPES) * LAYERS + head])
        x = {inputs: torch.randn(count, inputs) for inputs in {i for i, _ in shapes}}
        seconds = [float("inf"), float("inf")]
        for _ in range(rounds):
            for i, layers in enumerate((ours, theirs)):
                seconds[i] = min(seconds[i], once(layers[:timed], x) * scale)
        limit = limits.seconds(storage, weights, count)
        lines.append(Line(storage, count, seconds[0] * 1e3, seconds[1] * 1e3, limit * 1e3))
    return lines


def make_ours(weight: Tensor, storage: Storage) -> Matmul:
    layer = PackedLinear(weight.shape[1], weight.shape[0], bias=False, storage=storage)
    layer.fill(0, weight)
    return layer.forward


def make_theirs(weight: Tensor, storage: Storage) -> Matmul:
    if storage == "float32":
        return lambda x: functional.linear(x, weight)
    if storage == "bfloat16":
        narrow = weight.bfloat16()
        return lambda x: functional.linear(x.bfloat16(), narrow)
    q, scales = quantise_rows(weight)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(q, None)
    form: tuple[Any, ...] = (
        packed,
        scales.flatten(),
        zeros,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )

    def multiply(x: Tensor) -> Tensor:
        step = float(x.abs().max()) / 127
        unsigned = x.mul(1 / step).round_().add_(128).to(torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(unsigned, step, 128, *form)
        return out

    return multiply


def once(layers: Sequence[tuple[int, Matmul]], x: dict[int, Tensor]) -> float:
    time.sleep(0.05)  # torch's other threads spin for some 3 ms after their last work
    start = time.perf_counter()
    for inputs, layer in layers:
        layer(x[inputs])
    return time.perf_counter() - start


def best(call: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
