"""All of the chaos kit at its full length: `python -m tests.chaos`, which `make chaos` runs.

Each part's words go to the terminal and into one report. Exit status 1 if any part failed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path("bench/results")

PARTS = {
    "simulation": ["tests.chaos.simulation", "--seeds", "0:10000", "--jobs", "2"],
    "frames, parsers, partitions": [
        *("pytest", "tests/chaos", "--chaos-full", "-q", "--timeout", "1800"),
        *("--ignore", "tests/chaos/test_simulation.py"),  # the parts before and after this one
        *("--ignore", "tests/chaos/test_processes.py"),
    ],
    "processes": ["cluster.cli", "chaos", "--full", "--output", f"{RESULTS}/chaos.json"],
    "one answer": ["cluster.cli", "chaos", "--transcript", f"{RESULTS}/chaos-transcript.txt"],
}


def main() -> int:
    failed = []
    with (RESULTS / "chaos.txt").open("w", encoding="utf-8") as report:

        def tell(line: str) -> None:
            print(line, end="", flush=True)
            report.write(line)

        for name, words in PARTS.items():
            tell(f"== {name}: python -m {' '.join(words)}\n")
            started = time.monotonic()
            with subprocess.Popen(
                [sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True, encoding="utf-8"
            ) as part:
                assert part.stdout is not None
                for line in part.stdout:
                    tell(line)
            if part.returncode:
                failed.append(name)
            tell(f"== {name}: exit {part.returncode}, {time.monotonic() - started:.0f} s\n\n")
        tell(f"failed: {', '.join(failed) or 'nothing'}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
