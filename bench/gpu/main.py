"""From flags to the table: runs the parts, keeps what they find, never raises for one of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.gpu.machine import limits_of
from bench.gpu.options import GpuOptions, parse_options
from bench.gpu.part import Found, Part, Running
from bench.gpu.parts import chosen
from bench.gpu.report import one_line, table
from bench.gpu.setting import SMALL, Setting, Sizes
from cluster.errors import StartError

_LEAST_S = 5.0


def main(argv: Sequence[str]) -> int:
    """Returns 1 if a part failed or a check is off, 2 for flags that are wrong."""
    try:
        options, listed = parse_options(argv)
        parts = chosen(options)
    except StartError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    if listed:
        print("\n".join(part.name + (" (when asked for)" if part.extra else "") for part in parts))
        return 0
    found: list[Found] = []
    for one in Runs(options).all(parts):
        found.append(one)
        print(one_line(one), flush=True)
        save(options, found)
    print(table(found))
    print(f"Saved to {options.out}")
    return 0 if found and all(one.sound for one in found) else 1


class Runs:
    """The parts of one run, those that time one by one, the others several at once."""

    def __init__(self, options: GpuOptions) -> None:
        self._options = options
        self._setting = Setting(options.device, options.seed, SMALL if options.small else Sizes())
        self._ends = time.monotonic() + 60 * options.minutes
        self._running: list[Running] = []

    def all(self, parts: Sequence[Part]) -> Iterator[Found]:
        """As they end. No process outlives it."""
        try:
            for part in parts:
                room = 1 if part.alone else self._options.jobs
                yield from self._fewer_than(room)
                yield from self._begin(part)
                if part.alone:
                    for one in self._fewer_than(1):
                        if part.name == "machine":
                            limits = limits_of(one.rows)
                            self._setting = replace(self._setting, limits=limits)
                        yield one
            yield from self._fewer_than(1)
        finally:
            for running in self._running:
                running.end()

    def _begin(self, part: Part) -> Iterator[Found]:
        left = self._ends - time.monotonic()
        if left < _LEAST_S:
            yield Found(part, [], 0.0, f"not begun: --minutes {self._options.minutes:g} are over")
        else:
            self._running.append(Running(part, self._setting, left))

    def _fewer_than(self, count: int) -> Iterator[Found]:
        """Wait until there are."""
        while len(self._running) >= count:
            over = [running for running in self._running if running.over]
            for running in over:
                self._running.remove(running)
                yield running.wait()
            if not over:
                time.sleep(0.02)


def save(options: GpuOptions, found: Sequence[Found]) -> None:
    """Everything so far, so that what ends the run ends nothing else."""
    data: dict[str, Any] = {
        "date": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "seed": options.seed,
        "device": options.device,
        "small": options.small,
        "parts": [one.to_json() for one in found],
    }
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
