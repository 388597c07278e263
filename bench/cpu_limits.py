"""cpu_limits: what the cores themselves can do, in the same run as what is held against it.

Run as a program of its own, so that torch's threads are those asked for:

    python -m bench.cpu_limits 0 1      on cores 0 and 1, a thread each
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.errors import StartError

_READ_BYTES: Final = 1 << 30  # many times any cache
_SIDE: Final = 2048
_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Limits:
    """Of some cores together."""

    threads: int
    read_gb_s: float
    fp32_gflop_s: float  # 2048^3, MKL or oneDNN
    int8_gop_s: float  # torch._int_mm, 2048^3; 0 where torch has none here


def measure_limits(cores: Sequence[int]) -> Limits:
    """Raises StartError if it cannot be measured."""
    command = [sys.executable, "-m", "bench.cpu_limits", *map(str, cores)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise StartError(f"measuring the limits failed: {' '.join(last)}")
    return Limits(**json.loads(done.stdout))


def merged(measured: Iterable[Limits]) -> list[Limits]:
    """The best seen of each number of threads, fewest first: a limit is what nothing disturbed."""
    best: dict[int, Limits] = {}
    for limits in measured:
        seen = best.setdefault(limits.threads, limits)
        best[limits.threads] = Limits(
            limits.threads,
            max(seen.read_gb_s, limits.read_gb_s),
            max(seen.fp32_gflop_s, limits.fp32_gflop_s),
            max(seen.int8_gop_s, limits.int8_gop_s),
        )
    return [best[threads] for threads in sorted(best)]


def main(argv: Sequence[str]) -> int:
    """Print the limits of the given cores as JSON."""
    import torch

    cores = {int(word) for word in argv}
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    flops = 2.0 * _SIDE**3
    a, b = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    out = torch.empty(_SIDE, _SIDE)
    small = torch.randint(-127, 128, (_SIDE, _SIDE), dtype=torch.int8)
    memory = torch.ones(_READ_BYTES // 4)
    # MKL, which `mm` takes, holds back on CPUs that are not its maker's; oneDNN does not.
    left, right = a.to_mkldnn(), b.to_mkldnn()
    seconds = min(
        _best(lambda: torch.mm(a, b, out=out)),
        _best(lambda: torch.nn.functional.linear(left, right)),
    )
    try:
        int8 = flops / _best(lambda: torch._int_mm(small, small)) / 1e9
    except RuntimeError:
        int8 = 0.0
    limits = {
        "threads": len(cores),
        "read_gb_s": _READ_BYTES / _best(memory.sum) / 1e9,
        "fp32_gflop_s": flops / seconds / 1e9,
        "int8_gop_s": int8,
    }
    print(json.dumps(limits))
    return 0


def _best(work: Callable[[], object]) -> float:
    """Seconds of the quickest run within a second, the first left out."""
    work()
    best, deadline = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
