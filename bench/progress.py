"""Progress: one line on a terminal's stderr, rewritten in place; silent anywhere else."""

from __future__ import annotations

import sys
from typing import TextIO

_WIDTH = 30


class Progress:
    """Counts finished requests up to `total`. Writes only when the filled part grows."""

    def __init__(self, total: int, *, enabled: bool = True, out: TextIO = sys.stderr) -> None:
        self._total = total
        self._out = out if enabled and total > 0 and out.isatty() else None
        self._finished = 0
        self._failed = 0
        self._shown = -1

    def step(self, ok: bool) -> None:
        self._finished += 1
        self._failed += not ok
        if self._out is None:
            return
        # A hundred writes at most, however many requests: the bar must not cost what it watches.
        percent = 100 * self._finished // self._total
        if percent == self._shown:
            return
        self._shown = percent
        bar = "#" * (_WIDTH * percent // 100)
        failed = f", {self._failed} failed" if self._failed else ""
        self._out.write(f"\r[{bar:<{_WIDTH}}] {self._finished}/{self._total}{failed}")
        self._out.flush()

    def close(self) -> None:
        """Leave the line, so that what is printed next starts on one of its own."""
        if self._out is not None and self._finished:
            self._out.write("\n")
            self._out.flush()
